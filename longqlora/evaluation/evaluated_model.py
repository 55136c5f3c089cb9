"""Loading the model of a system for evaluation: its weights and their precision, its context extension and its attention."""

import json
from pathlib import Path

from transformers import PreTrainedModel

from longqlora.config.settings import Device, EvaluatedModel
from longqlora.data.hub import is_hub_id, pinned_model, split_revision
from longqlora.modeling.attention import register_shifted_sparse_attention
from longqlora.modeling.devices import find_device, keep_freed_memory
from longqlora.modeling.loading import load_config, load_model, put_adapter
from longqlora.modeling.rope import context_of


def is_within_context(model: EvaluatedModel, window: int) -> bool:
    """Whether a model is made to read ``window`` tokens at once: its context is that long, or its RoPE scaling is dynamic,
    which adapts to any length.

    Raises:
        ValueError: if the model cannot read that many tokens at all.
    """
    config = load_config(model.path, model.extension)
    if window > getattr(config, "max_seq_len", window):  # MPT: the ALiBi bias is built for a fixed number of tokens
        raise ValueError(f"{model.path}: a window of {window} tokens is beyond the {config.max_seq_len} that the model takes")
    rope = getattr(config, "rope_parameters", None) or {}
    return window <= context_of(config) or rope.get("rope_type") == "dynamic"


def at_commit(model: EvaluatedModel) -> EvaluatedModel:
    """The model at one commit of the hub: that on which its adapter was trained, or that which its revision has now; a model in
    a folder stays as it is."""
    if model.adapter and is_hub_id(model.path):
        revision = json.loads((Path(model.adapter) / "adapter_config.json").read_text(encoding="utf-8"))["revision"]
        return model.model_copy(update={"path": f"{split_revision(model.path)[0]}@{revision}"})
    return model.model_copy(update={"path": pinned_model(model.path)})


def memory_advice(model: EvaluatedModel, window: int) -> tuple[str, str]:
    """The two arguments of :func:`longqlora.jobs.memory.memory_explained`: what an evaluation does, and which settings make it
    need less memory."""
    return (
        f"reading {window} tokens at once with {model.path} in precision {model.precision}",
        "A smaller evaluation.precision (nf4 takes least), or shorter evaluation.lengths.",
    )


def load_evaluated_model(model: EvaluatedModel, device: Device, window: int) -> PreTrainedModel:
    """Load a model in evaluation mode.

    Args:
        model: the model to load. An adapter is applied by peft and not merged into the weights.
        device: ``cpu`` or ``cuda``; on a CPU, this process keeps freed memory for reuse from now on.
        window: largest number of tokens that it is going to read at once; shifted sparse attention derives its groups from it.
    """
    torch_device = find_device(device)
    keep_freed_memory(torch_device)
    attention = None  # transformers chooses: SDPA if the model supports it, which MPT does not
    if model.attention == "shifted_sparse":
        attention = register_shifted_sparse_attention(model.group_ratio, window, in_evaluation=True)
    loaded = load_model(
        model.path,
        device=torch_device,
        precision=model.precision,
        extension=model.extension,
        attn_implementation=attention,
    )
    if model.adapter:
        put_adapter(loaded, model.adapter)
    return loaded.eval()
