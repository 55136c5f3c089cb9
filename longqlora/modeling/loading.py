"""Loading models: precision, quantization and RoPE scaling."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from longqlora.config.settings import Precision, RopeExtension
from longqlora.modeling.compatibility import quantization_problems
from longqlora.modeling.devices import compute_dtype, weight_dtype
from longqlora.modeling.rope import extend_context

NF4_BLOCK = 64  # weights that share a scale


def load_config(path: str, extension: RopeExtension | None = None):
    """The configuration of a model, with its context extended if ``extension`` is given."""
    config = AutoConfig.from_pretrained(path)
    return extend_context(config, extension) if extension else config


def stored_dtype(config) -> torch.dtype:
    """The dtype of the weights in a checkpoint, by its configuration; float32 if the configuration does not record it."""
    return config.dtype or torch.float32


def load_model(
    path: str,
    *,
    device: torch.device,
    precision: Precision = "auto",
    extension: RopeExtension | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Load a causal language model onto one device.

    Args:
        path: directory or hub id.
        device: of all weights.
        precision: ``nf4`` (4 bit, double quantization; QLoRA, arXiv 2305.14314), ``int8`` (LLM.int8(), arXiv 2208.07339), a
            float type, or ``auto``: see :func:`longqlora.modeling.devices.weight_dtype`.
        extension: extends the context; None keeps it.
        attn_implementation: attention function, by its name in transformers; None lets transformers choose.

    Raises:
        ValueError: if the context cannot be extended, or the weights are stored quantized and ``precision`` is not ``auto``.
    """
    config = load_config(path, extension)
    for problem in quantization_problems(config.to_dict(), trained=False, precision=precision):
        raise ValueError(f"{path}: {problem}")
    kwargs: dict[str, Any] = {"attn_implementation": attn_implementation, "dtype": weight_dtype(device)}
    if precision in ("int8", "nf4"):
        kwargs["quantization_config"] = quantization(precision, device)
    elif precision != "auto":
        kwargs["dtype"] = getattr(torch, precision)
    if not is_deepspeed_zero3_enabled():  # ZeRO-3 places the weights itself
        kwargs["device_map"] = {"": device}
    model = AutoModelForCausalLM.from_pretrained(path, config=config, **kwargs)
    avoid_repacking(model)
    return model


def quantization(precision: Precision, device: torch.device):
    """The quantization of ``int8`` or ``nf4``, as transformers takes it."""
    from transformers import BitsAndBytesConfig

    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=compute_dtype(device),
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
    )


def avoid_repacking(model: PreTrainedModel) -> None:
    """Switch off bitsandbytes' repacking for layers of a 4-bit model whose rows are not a multiple of the quantization block.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 repacks every layer for inference row by row, which fails for these layers.
    """
    module: Any
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False) and module.in_features % NF4_BLOCK:
            module.support_avx512bf16_for_cpu = False
