"""Norms by one kernel on a GPU.

transformers computes an RMSNorm by six operations, each of which reads and writes the whole window, in float32. torch has a
kernel for it, which reads the window once and keeps its input and a number per token for the backward pass.
"""

from collections.abc import Callable

import torch
from torch.nn import functional
from transformers import PreTrainedModel


def use_fused_norms(model: PreTrainedModel) -> None:
    """Let the norms of a model use torch's kernel where there is one. The result is the same but for rounding: the kernel
    multiplies by the weight in float32, and rounds once.

    Args:
        model: of one of :data:`longqlora.modeling.compatibility.ROPE_FAMILIES`, with its adapter if it has one.
    """
    for module in model.get_decoder().modules():
        if "variance_epsilon" in vars(module):  # peft's wrapper of a norm in modules_to_save has the attributes of its copy
            module.forward = fused(module)


def fused(norm) -> Callable[[torch.Tensor], torch.Tensor]:
    """The forward pass of a norm, ``[…, d] → […, d]``."""
    forward = norm.forward

    def forward_fused(hidden: torch.Tensor) -> torch.Tensor:
        if not has_kernel(hidden) or hidden.dtype is not norm.weight.dtype:
            return forward(hidden)
        with torch.autocast(hidden.device.type, enabled=False):  # which would have it computed in float32
            return functional.rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon)

    return forward_fused


def has_kernel(hidden: torch.Tensor) -> bool:
    """Whether torch has a fused kernel where a tensor is."""
    return hidden.is_cuda
