"""Whether a base model can be extended and trained, checked against its ``config.json`` before weights are loaded.

Standard library and settings only, because the workflow checks local models whenever it starts. A training job checks again,
for models of the hub.
"""

from collections.abc import Iterator

from longqlora.config.settings import Precision, TrainingSettings

ROPE_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OTHER_MODULES = ("embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm", "q_norm", "k_norm")


def extension_problems(model: dict, target_context: int, settings: TrainingSettings | None = None) -> Iterator[str]:
    """Yield why a model of this shape cannot be extended to a context and trained there; every message names both values. Its
    own context and scaling are checked by :func:`longqlora.modeling.rope.scaling_problems`.

    Args:
        model: its ``config.json``. Fields that it leaves to the defaults of its family are not checked.
        target_context: target context in tokens.
        settings: of its training; None if it is not trained.
    """
    family = model.get("model_type")
    if family not in ROPE_FAMILIES:
        yield f"is a {family!r} model; RoPE families that can be extended: {', '.join(ROPE_FAMILIES)}"
        return
    width, heads = model.get("hidden_size"), model.get("num_attention_heads")
    key_value_heads = model.get("num_key_value_heads") or heads
    if width and heads and not model.get("head_dim") and width % heads:
        yield f"hidden_size {width} is not divisible by num_attention_heads {heads}"
    if heads and heads % key_value_heads:
        yield f"num_attention_heads {heads} is not divisible by num_key_value_heads {key_value_heads}"
    if settings:
        yield from training_problems(model, target_context, settings)


def quantization_problems(model: dict, *, trained: bool, precision: Precision, original: str | None = None) -> Iterator[str]:
    """Yield why a model that is stored quantized cannot be used: an adapter is merged into the exact weights, and an evaluation
    must not record a precision that the weights do not have.

    Args:
        model: its ``config.json``.
        trained: whether it is trained, and not only evaluated.
        precision: of its weights in evaluation.
        original: hub id of the model that it was made from, if known.
    """
    stored = model.get("quantization_config") or model.get("compression_config")
    if not isinstance(stored, dict):
        return
    bits = 4 if stored.get("load_in_4bit") else 8 if stored.get("load_in_8bit") else stored.get("bits")
    what = f"its weights are stored quantized ({stored.get('quant_method', 'bitsandbytes')}{f', {bits} bit' if bits else ''})"
    if trained:
        yield f"{what}; training needs the model that they were made from{f', {original}' if original else ''}, unquantized"
    elif precision != "auto":
        yield f"{what} and cannot be evaluated in precision {precision}; its row needs precision: auto"


def training_problems(model: dict, target_context: int, settings: TrainingSettings) -> Iterator[str]:
    """Yield why a model of a known family cannot be trained with these settings; see :func:`extension_problems`."""
    window = model.get("sliding_window") if model.get("use_sliding_window", True) else None
    if window and window < target_context and settings.attention == "shifted_sparse":
        yield f"attention shifted_sparse at {target_context} tokens: the model has a sliding window of {window}; use 'full'"
    elif window and window < target_context and settings.sequence_parallel > 1:
        yield f"sequence_parallel at {target_context} tokens: the model has a sliding window of {window}"
    heads = model.get("num_key_value_heads") or model.get("num_attention_heads") or settings.sequence_parallel
    if heads % settings.sequence_parallel:
        yield f"sequence_parallel {settings.sequence_parallel} does not divide the model's {heads} heads of keys and values"
    if settings.method == "full":
        return
    if settings.rank > (model.get("hidden_size") or settings.rank):
        yield f"rank {settings.rank} is above the model's width, hidden_size {model['hidden_size']}"
    if model.get("tie_word_embeddings") and "lm_head" in settings.modules_to_save:
        yield "modules_to_save: 'lm_head' shares its weight with 'embed_tokens' (tie_word_embeddings); name 'embed_tokens'"
    adapted = [] if settings.target_modules == "all-linear" else settings.target_modules
    named = {"target_modules": (adapted, LINEAR_LAYERS), "modules_to_save": (settings.modules_to_save, OTHER_MODULES)}
    for key, (names, legal) in named.items():
        for name in names:
            if name.split(".")[-1] not in legal:
                yield f"{key}: {name!r} matches no layer of a {model['model_type']} model; it has {', '.join(legal)}"
