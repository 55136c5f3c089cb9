"""Loading models: precision, 4-bit quantization and RoPE scaling."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from longqlora.modeling.devices import compute_dtype, weight_dtype
from longqlora.modeling.rope import extend_context

NF4_BLOCK = 64  # weights that share a scale
FLOATS = ("float32", "bfloat16", "float16")
PRECISIONS = ("auto", *FLOATS, "int8", "nf4")


def load_config(path: str, target_context: int | None = None, rope_scaling: str = "linear"):
    """Configuration of a model, its context extended to ``target_context`` tokens if given (:mod:`longqlora.modeling.rope`)."""
    config = AutoConfig.from_pretrained(path)
    return extend_context(config, target_context, rope_scaling) if target_context else config


def stored_dtype(config) -> torch.dtype:
    """The type that a checkpoint holds its weights in, as its configuration says; float32 where it does not."""
    return config.dtype or torch.float32


def load_model(
    path: str,
    *,
    device: torch.device,
    precision: str = "auto",
    target_context: int | None = None,
    rope_scaling: str = "linear",
    **kwargs,
) -> PreTrainedModel:
    """Load a causal language model for ``device``, on one device.

    Args:
        path: a directory or a hub id.
        precision: ``nf4`` (4 bit, double quantisation; QLoRA, arXiv 2305.14314), ``int8`` (LLM.int8(), arXiv 2208.07339), a
            float type, or ``auto``: the device's autocast type on a GPU, float32 on a CPU.
        target_context: extend the context to so many tokens; None keeps it.
        rope_scaling: how, see :func:`longqlora.modeling.rope.extend_context`.
        kwargs: to ``from_pretrained`` (``attn_implementation``).

    Raises:
        ValueError: if the precision is unknown, or the context cannot be extended.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is unknown; known are {', '.join(PRECISIONS)}")
    if precision in ("int8", "nf4"):
        from transformers import BitsAndBytesConfig

        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        kwargs["quantization_config"] = (
            BitsAndBytesConfig(load_in_8bit=True)
            if precision == "int8"
            else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute_dtype(device), **nf4)
        )
    kwargs["dtype"] = getattr(torch, precision) if precision in FLOATS else weight_dtype(device)
    config = load_config(path, target_context, rope_scaling)
    if not is_deepspeed_zero3_enabled():  # which places the weights itself
        kwargs["device_map"] = {"": device}
    model = AutoModelForCausalLM.from_pretrained(path, config=config, **kwargs)
    if precision == "nf4":
        avoid_repacking(model)
    return model


def avoid_repacking(model: PreTrainedModel) -> None:
    """Keep layers of a 4-bit model as they are whose rows are no whole number of quantization blocks.

    On a CPU with AVX512-BF16 bitsandbytes 0.50 repacks each layer for inference row by row, and fails on these.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False) and module.in_features % NF4_BLOCK:
            module.support_avx512bf16_for_cpu = False
