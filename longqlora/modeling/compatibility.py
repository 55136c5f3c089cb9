"""Whether a base model can be extended and trained as a system asks, told from its configuration before weights are loaded.

Imports nothing heavy: the workflow asks on every start, a training job again for a model of the hub.
"""

from collections.abc import Iterator

ROPE_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OTHER_MODULES = ("embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm", "q_norm", "k_norm")


def extension_problems(model: dict, target_context: int, settings: dict | None = None) -> Iterator[str]:
    """Yield why a model cannot be extended to a context, and trained there; each message names both values.

    Args:
        model: its ``config.json``, which may leave out what the family has by default; that is checked when it is loaded.
        target_context: target context in tokens.
        settings: the system's ``training`` section; None if it is not trained.
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
    own = model.get("max_position_embeddings", target_context)
    if target_context < own:
        yield f"target_context {target_context} is below the model's own context of {own} tokens"
    scaling = model.get("rope_parameters") or model.get("rope_scaling") or {}
    if target_context > own and scaling.get("rope_type", scaling.get("type", "default")) != "default":
        yield f"target_context {target_context}: positions are scaled already ({scaling}); start from the unscaled model"
    if settings:
        yield from training_problems(model, target_context, settings)


def training_problems(model: dict, target_context: int, settings: dict) -> Iterator[str]:
    """Yield why a model of a known family cannot be trained so."""
    window = model.get("sliding_window") if model.get("use_sliding_window", True) else None
    if window and window < target_context and settings["attention"] == "shifted_sparse":
        yield f"attention shifted_sparse at {target_context} tokens: the model has a sliding window of {window}; use 'full'"
    if settings["method"] == "full":
        return
    if settings["rank"] > model.get("hidden_size", settings["rank"]):
        yield f"rank {settings['rank']} is above the model's width, hidden_size {model['hidden_size']}"
    if model.get("tie_word_embeddings") and "lm_head" in settings["modules_to_save"]:
        yield "modules_to_save: 'lm_head' shares its weight with 'embed_tokens' (tie_word_embeddings); name 'embed_tokens'"
    known = {"target_modules": LINEAR_LAYERS, "modules_to_save": OTHER_MODULES}
    for key, legal in known.items():
        names = settings[key] if isinstance(settings[key], list) else []
        for name in names:
            if name.split(".")[-1] not in legal:
                yield f"{key}: {name!r} matches no layer of a {model['model_type']} model; it has {', '.join(legal)}"
