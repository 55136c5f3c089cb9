"""Attention in windows whose tokens several processes share: sequence parallelism as in DeepSpeed Ulysses (Jacobs et al. 2023,
arXiv 2309.14509).

Each process computes a part of the tokens. For the attention, the processes exchange queries, keys and values, so that each has
all tokens for a part of the heads; they exchange its outputs back.

Shapes: b batch, h query heads, n tokens of a window, d width of a head, s processes that share it.
"""

from typing import Any

import torch
from torch.autograd import Function
from torch.distributed import ProcessGroup, all_to_all_single
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS


class Swap(Function):
    """Sends part i of a tensor to process i, and returns the parts that were received, in the order of the processes.

    torch's own exchanges with a gradient are deprecated (``torch.distributed.nn``) or private (``_functional_collectives``).

    Args:
        sent: ``[s, …]``
        group: the s processes.
    """

    @staticmethod
    def forward(ctx: Any, sent: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        ctx.group, received = group, torch.empty_like(sent)
        all_to_all_single(received, sent, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        return Swap.apply(gradients[0].contiguous(), ctx.group), None


def exchange(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Send each process its part of dimension 1, and receive its part of dimension 2.

    Args:
        x: ``[b, s · i, j, d]``; the part of another process goes there, in the order of their ranks.
        group: the s processes.

    Returns:
        ``[b, i, s · j, d]``
    """
    sent = x.unflatten(1, (group.size(), -1)).movedim(1, 0).contiguous()  # [s, b, i, j, d]
    return Swap.apply(sent, group).movedim(0, 2).flatten(2, 3)


def register_shared_attention(name: str, group: ProcessGroup) -> str:
    """Register an attention for windows that processes share, and return its name for ``attn_implementation``.

    Args:
        name: of an attention that is registered with transformers, and takes no mask for a window of one document.
        group: the processes that share a window; their number divides those of query heads and of key and value heads.
    """
    attend = AttentionInterface()[name]

    def forward(module, query, key, value, attention_mask, **kwargs):
        if attention_mask is not None:
            raise ValueError("windows that processes share take no attention mask: pad on the right and leave the mask out")
        first = query.shape[1] // 2 - query.shape[1] // group.size() * group.rank()
        query, key, value = (exchange(x, group) for x in (query, key, value))  # [b, h, n/s, d] -> [b, h/s, n, d]
        straight = min(max(first, 0), query.shape[1])
        out, _ = attend(module, query, key, value, None, straight_heads=straight, **kwargs)
        return exchange(out, group), None  # [b, n, h/s, d] -> [b, n/s, h, d]

    shared = f"{name}_shared"
    AttentionInterface.register(shared, forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(shared, ALL_MASK_ATTENTION_FUNCTIONS[name])
    return shared
