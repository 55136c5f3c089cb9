"""Loading models: precision by hardware, 4-bit quantisation, rope scaling, and the loss that never holds a window's logits."""

import ctypes
import os
import sys
from types import MethodType

import torch
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import linear_cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import CausalLMOutput

from longqlora.positions import extend_context
from longqlora.tokens import IGNORED

NF4_BLOCK = 64  # weights that share a scale
FLOATS = ("float32", "bfloat16", "float16")
PRECISIONS = ("auto", *FLOATS, "int8", "nf4")
CHUNKED = LinearCrossEntropyOptions(batch_chunk_size=512, chunking_method=None)
"""Tokens whose logits exist at once: torch's own choice, some 32 for a vocabulary of 32,000, takes twice as long on a CPU."""


def autocast_dtype(device: torch.device) -> torch.dtype:
    """The type that a device computes fastest in: bfloat16 where the hardware has it, float16 on older GPUs (V100), float32
    on a CPU that would only emulate bfloat16."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def resident_dtype(device: torch.device) -> torch.dtype:
    """The type that weights are kept in if the configuration leaves it open: the autocast type on a GPU, float32 on a CPU."""
    return autocast_dtype(device) if device.type == "cuda" else torch.float32


def find_device(name: str) -> torch.device:
    """``cuda`` or ``cpu`` as a device; on a CPU, memory is from now on kept for reuse (:func:`keep_freed_memory`).

    Raises:
        ValueError: if the configuration asks for a GPU and torch sees none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda is configured, but torch sees no GPU on this machine; 'cpu' would run without one")
    if name == "cpu":
        keep_freed_memory()
        return torch.device(name)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))  # of this process, where torchrun started several
    check_kernels(device)
    torch.cuda.set_device(device)
    return device


def check_kernels(device: torch.device) -> None:
    """Check that the installed torch can compute on a GPU at all.

    A build has kernels for a list of architectures (``sm_80`` runs on 8.0 and newer 8.x), and perhaps code that the driver
    compiles for newer ones (``compute_90``).

    Raises:
        ValueError: if it has none for this card; the message names the build that has.
    """
    major, minor = torch.cuda.get_device_capability(device)
    for architecture in torch.cuda.get_arch_list():
        kind, number = architecture.rstrip("af").split("_")  # sm_90a: what is for one architecture alone
        built_major, built_minor = int(number[:-1]), int(number[-1])
        runs_as_it_is = kind == "sm" and built_major == major and built_minor <= minor
        if runs_as_it_is or (kind == "compute" and (built_major, built_minor) <= (major, minor)):
            return
    name, build = torch.cuda.get_device_name(device), f"torch {torch.__version__} (CUDA {torch.version.cuda})"
    advice = "a newer build of torch has them"
    if (major, minor) < (
        7,
        5,
    ):  # CUDA 13 dropped what is older than Turing; torch up to 2.14 has a build for 12.6 too
        advice = (
            "install the build of torch 2.13 for CUDA 12.6 (cu126, from PyTorch's own package index), which has them for the "
            "V100 and older cards"
        )
    raise ValueError(
        f"{name} has compute capability {major}.{minor}, for which {build} has no kernels "
        f"(it has {' '.join(torch.cuda.get_arch_list())}): {advice}"
    )


def keep_freed_memory() -> None:
    """Let this process keep freed memory, as torch does on a GPU, where the C library is glibc.

    By default glibc gives large tensors back to the system when they are freed, and the page faults of the next ones are a
    tenth of the time of a small model's training step. What it keeps is torn into pieces that fit no other tensor, at worst
    to three times what is in use; so tensors of 8 MiB and more are mapped by themselves, in the huge pages that a job asks
    torch for (:mod:`longqlora.jobs.log`), which fault seldom.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, 8 * 2**20)  # M_MMAP_THRESHOLD: fixed, where glibc would raise it as tensors are freed
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


def load_config(path: str, context_length: int | None = None, rope_type: str = "linear"):
    """Configuration of a model, its context extended to ``context_length`` tokens if given (:mod:`longqlora.positions`)."""
    config = AutoConfig.from_pretrained(path)
    return extend_context(config, context_length, rope_type) if context_length else config


def name_of(dtype: torch.dtype) -> str:
    """``bfloat16`` of ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def stored_dtype(config) -> torch.dtype:
    """The type that a checkpoint holds its weights in, as its configuration says; float32 where it does not."""
    return config.dtype or torch.float32


def load_model(
    path: str,
    *,
    device: torch.device,
    precision: str = "auto",
    context_length: int | None = None,
    rope_type: str = "linear",
    **kwargs,
) -> PreTrainedModel:
    """Load a causal language model for ``device``, on one device.

    Args:
        path: a directory or a hub id.
        precision: ``nf4`` (4 bit, double quantisation; QLoRA, arXiv 2305.14314), ``int8`` (LLM.int8(), arXiv 2208.07339), a
            float type, or ``auto``: the device's autocast type on a GPU, float32 on a CPU.
        context_length: extend the context to so many tokens; None keeps it.
        rope_type: how, see :func:`longqlora.positions.extend_context`.
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
            else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=autocast_dtype(device), **nf4)
        )
    kwargs["dtype"] = getattr(torch, precision) if precision in FLOATS else resident_dtype(device)
    config = load_config(path, context_length, rope_type)
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


def next_token_loss(model: PreTrainedModel, input_ids, labels, num_items_in_batch=None, **kwargs) -> torch.Tensor:
    """Cross-entropy of the next token from the hidden states, in chunks, so that the logits of a window never exist at once.

    Args:
        model: a causal language model of transformers.
        input_ids: ``[b, n]``
        labels: ``[b, n]``, the ids to predict at their own places (shifted in here), -100 where nothing is to be learned.
        num_items_in_batch: number of labels to divide by; None: those of this batch.
        kwargs: to the decoder.

    Returns:
        Scalar: the summed loss over the number of labels.
    """
    hidden = model.base_model(input_ids=input_ids, use_cache=False, **kwargs).last_hidden_state[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten()
    weight = model.get_output_embeddings().weight
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    total = summed_nll(hidden, weight, targets)
    count = num_items_in_batch if num_items_in_batch is not None else (targets != IGNORED).sum()
    return total / torch.as_tensor(count).clamp(min=1)  # nothing to learn is no loss; 0 / 0 would spoil the whole adapter


def summed_nll(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of tokens from the hidden states before them, summed in float32, in chunks of tokens.

    Args:
        hidden: ``[n, width]``
        weight: ``[vocabulary, width]``, of the output layer.
        targets: ``[n]``, -100 where a token does not count.
    """
    # a sum comes with its gradient, so that no logits are computed twice; but one in bfloat16 would keep two digits
    reduction = "sum" if hidden.dtype is torch.float32 else "none"
    return linear_cross_entropy(hidden, weight, targets, reduction=reduction, options=CHUNKED).float().sum()


def use_chunked_loss(model: PreTrainedModel) -> PreTrainedModel:
    """Make ``model(input_ids, labels=…)`` compute its loss by :func:`next_token_loss` and return no logits, so that trainers
    and wrappers that call the model get it."""

    def forward(self, input_ids, labels, num_items_in_batch=None, **kwargs):
        return CausalLMOutput(loss=next_token_loss(self, input_ids, labels, num_items_in_batch, **kwargs))

    model.forward = MethodType(forward, model)
    return model
