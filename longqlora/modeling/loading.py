"""Loading models: precision, quantization and RoPE scaling."""

import math
import warnings
from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from longqlora.config.settings import Precision, RopeExtension
from longqlora.data.hub import split_revision
from longqlora.modeling.compatibility import quantization_problems
from longqlora.modeling.devices import compute_dtype, weight_dtype
from longqlora.modeling.rope import extend_context

NF4_BLOCK = 64  # weights that share a scale
REPACKED_OUTPUTS = 32  # of a layer, which bitsandbytes repacks together
BITSANDBYTES = torch.library.Library("bitsandbytes", "IMPL")  # what is registered with it lasts as long as it


def load_config(path: str, extension: RopeExtension | None = None):
    """The configuration of a model, with its context extended if ``extension`` is given."""
    name, revision = split_revision(path)
    config = AutoConfig.from_pretrained(name, revision=revision)
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
    name, revision = split_revision(path)
    model = AutoModelForCausalLM.from_pretrained(name, revision=revision, config=config, **kwargs)
    if getattr(model, "is_loaded_in_4bit", False):
        dequantize_across_rows()
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


@cache
def dequantize_across_rows() -> None:
    """Let bitsandbytes dequantize layers right on a CPU whose rows are not a multiple of the quantization block.

    A block continues in the next row, but on a CPU with AVX512, bitsandbytes 0.50 begins a new one in each row of 16, 32 or 48
    weights beyond a multiple of 64: the weights get more than twice the error of NF4. A layer in one row is dequantized right.
    """
    import bitsandbytes  # noqa: F401 (registers the kernel)

    kernel = torch.library.get_kernel("bitsandbytes::dequantize_4bit", "CPU")

    def in_one_row(dispatch_keys, packed, absmax, blocksize, quant_type, shape, dtype):
        flat = shape if shape[-1] % blocksize == 0 else [math.prod(shape)]
        return kernel.call_boxed(dispatch_keys, packed, absmax, blocksize, quant_type, flat, dtype).reshape(shape)

    with warnings.catch_warnings(action="ignore"):  # that a kernel is replaced
        BITSANDBYTES.impl("dequantize_4bit", in_one_row, "CPU", with_keyset=True, allow_override=True)


def put_adapter(model: PreTrainedModel, folder: str) -> None:
    """Put a trained adapter on a model, without merging it: its layers replace those of the model.

    Args:
        model: in any precision.
        folder: of the adapter, in peft's format.
    """
    from peft import PeftModel  # slow to import, and few evaluations need it

    adapted: Any = PeftModel.from_pretrained(model, folder)
    if adapted.active_peft_config.use_dora:  # needs the weights' norms, which peft would compute from repacked weights
        avoid_repacking(model, every_layer=True)


def avoid_repacking(model: PreTrainedModel, *, every_layer: bool = False) -> None:
    """Switch off bitsandbytes' repacking for layers of a 4-bit model that it cannot repack, or for every layer.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 repacks every layer for inference: inputs in blocks of the quantization,
    outputs in groups of 32. It fails for a layer of other widths.
    """
    module: Any
    for module in model.modules():
        fits = getattr(module, "in_features", 0) % NF4_BLOCK == 0 and getattr(module, "out_features", 0) % REPACKED_OUTPUTS == 0
        if getattr(module, "support_avx512bf16_for_cpu", False) and (every_layer or not fits):
            module.support_avx512bf16_for_cpu = False
