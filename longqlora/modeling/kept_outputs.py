"""Activation checkpointing that keeps what is expensive: the outputs of linear layers and of the attention.

Without this, the backward pass computes a whole layer again from its input. With it, the products of the forward pass are taken
from memory, and only the rest is computed again: norms, rotations, activation functions, dropout, and the products of an
adapter. torch's selective checkpointing (``create_selective_checkpoint_contexts``) knows an operation by its name only, and an
adapter's products have the same name as the base's.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

PRODUCTS = ("aten::mm", "aten::addmm", "bitsandbytes::gemm_4bit")
ATTENTION = "aten::_scaled_dot_product"  # beginning of the names of the fused kernels

BLOCK, ALIGNMENT = 8 * 2**20, 64
"""Bytes. Each block has a mapping of its own (:func:`longqlora.modeling.devices.keep_freed_memory`). Smaller tensors that stay
between those that are freed soon would leave holes in glibc's heap: 150 to 200 MiB in 6 layers of width 512 at 2048 tokens."""


class Inside:
    """Whether this process is computing a linear layer whose output is kept; ``entered`` counts."""

    entered = 0

    @classmethod
    @contextmanager
    def linear(cls) -> Iterator[None]:
        cls.entered += 1
        try:
            yield
        finally:  # also if the recomputation ends in here
            cls.entered -= 1


def is_kept(name: str) -> bool:
    """Whether the output of an operation is kept, by its name."""
    return name.startswith(ATTENTION) or (Inside.entered > 0 and name in PRODUCTS)


class Keep(TorchDispatchMode):
    """Keeps outputs of the forward pass of a layer, in their order."""

    def __init__(self, kept: deque):
        super().__init__()
        self.kept, self.block = kept, torch.empty(0, dtype=torch.uint8)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **kwargs or {})
        if is_kept(func.name()):
            self.kept.append(tree_map_only(torch.Tensor, self.keep, output))
        return output

    def keep(self, output: torch.Tensor) -> torch.Tensor:
        """An output without its graph; on a CPU, a small one is copied into a block of :data:`BLOCK` bytes."""
        output = output.detach()
        if output.device.type != "cpu" or output.nbytes >= BLOCK:
            return output
        if self.block.nbytes < output.nbytes:
            self.block = torch.empty(BLOCK, dtype=torch.uint8)
        place, self.block = self.block[: output.nbytes], self.block[-(-output.nbytes // ALIGNMENT) * ALIGNMENT :]
        strides = torch.empty_like(output, device="meta").stride()
        return (
            place.view(output.dtype).as_strided(output.shape, strides, place.storage_offset() // output.itemsize).copy_(output)
        )

    def __exit__(self, *error):
        if self.kept:
            self.kept.pop()  # the last product of a layer is only added to its input, and no gradient needs it
        return super().__exit__(*error)


class Reuse(TorchDispatchMode):
    """Takes outputs from those that were kept, instead of computing them; what is not there is computed."""

    def __init__(self, kept: deque):
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.kept and is_kept(func.name()):
            return self.kept.popleft()
        return func(*args, **kwargs or {})


def keep_and_reuse() -> tuple[Keep, Reuse]:
    """Contexts of one checkpointed layer, for its forward pass and its recomputation (``context_fn`` of torch's
    ``checkpoint``)."""
    kept: deque[Any] = deque()
    return Keep(kept), Reuse(kept)


def mark_linear_layers(model: PreTrainedModel) -> None:
    """Let the linear layers of a model be known as such to :class:`Keep` and :class:`Reuse`, but not those of its adapter.

    Args:
        model: of transformers, with its adapter if it has one.
    """
    for name, module in model.get_decoder().layers.named_modules():
        if isinstance(module, torch.nn.Linear) and ".lora_" not in name:
            module.forward = marked(module.forward)  # type: ignore[method-assign]


def marked(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The forward pass of a linear layer, inside of :meth:`Inside.linear`."""

    def forward_inside(*args, **kwargs) -> torch.Tensor:
        with Inside.linear():
            return forward(*args, **kwargs)

    return forward_inside
