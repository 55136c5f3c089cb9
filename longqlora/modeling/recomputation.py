"""What a layer computes again in the backward pass (activation checkpointing), and what it takes from memory instead.

By itself, checkpointing computes a whole layer again from its input. Two things can be left out:

* The last product of a layer is only added to the layer's input, and no gradient needs it.
* Outputs of linear layers and of the attention can be kept. Then only the rest is computed again: norms, rotations, activation
  functions, dropout, and an adapter's products with its matrices A. torch's selective checkpointing
  (``create_selective_checkpoint_contexts``) knows an operation by its name only, and those have the same name as the base's.
"""

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

PRODUCTS = ("aten::mm", "aten::addmm", "bitsandbytes::gemm_4bit")
ATTENTION = "aten::_scaled_dot_product"  # beginning of the names of the fused kernels

BLOCK, ALIGNMENT = 8 * 2**20, 64
"""Bytes. Each block has a mapping of its own (:func:`longqlora.modeling.devices.keep_freed_memory`). Smaller tensors that stay
between those that are freed soon would leave holes in glibc's heap: 150 to 200 MiB in 6 layers of width 512 at 2048 tokens."""


class Inside:
    """Where this process is.

    Attributes:
        recomputation: in a layer, or a part of it, that is computed again.
        linear: in a linear layer whose output is kept.
        outputs: in a layer whose outputs are kept or reused, by this.
    """

    recomputation: bool = False
    linear: bool = False
    outputs: "Keep | Reuse | None" = None


class inside(AbstractContextManager):
    """Set attributes of :class:`Inside`. The same object can be entered again, as a graph can be passed again."""

    def __init__(self, **places: Any):
        self.places = places

    def __enter__(self) -> None:
        self.former = {place: getattr(Inside, place) for place in self.places}
        self.set(self.places)

    def __exit__(self, *error) -> None:  # also if the recomputation ends in here
        self.set(self.former)

    def set(self, places: dict[str, Any]) -> None:
        for place, value in places.items():
            setattr(Inside, place, value)


def is_kept(name: str) -> bool:
    """Whether the output of an operation is kept, by its name."""
    return name.startswith(ATTENTION) or (Inside.linear and name in PRODUCTS)


class Blocks:
    """Blocks of :data:`BLOCK` bytes for the small tensors that the layers of a model keep. Those of a model that is traced are
    fake tensors.

    Attributes:
        rest: what is left of the newest block.
    """

    def __init__(self):
        self.rest = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in a block."""
        if self.rest.nbytes < tensor.nbytes:
            self.rest = torch.empty(BLOCK, dtype=torch.uint8)
        place, self.rest = self.rest[: tensor.nbytes], self.rest[-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT :]
        strides = torch.empty_like(tensor, device="meta").stride()
        return (
            place.view(tensor.dtype).as_strided(tensor.shape, strides, place.storage_offset() // tensor.itemsize).copy_(tensor)
        )


class Keep(TorchDispatchMode):
    """Keeps outputs of the forward pass of a layer, in their order."""

    def __init__(self, kept: deque, blocks: Blocks):
        super().__init__()
        self.kept, self.blocks, self.place = kept, blocks, inside(outputs=self)

    def __enter__(self):
        self.place.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        if self.kept:
            self.kept.pop()  # the last product of the layer
        self.place.__exit__()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **kwargs or {})
        if is_kept(func.name()):
            self.kept.append(tree_map_only(torch.Tensor, self.keep, output))
        return output

    def compute(self, output_of: Callable[[], torch.Tensor]) -> torch.Tensor:
        """An output that is kept."""
        output = output_of()
        self.kept.append(self.keep(output))
        return output

    def keep(self, output: torch.Tensor) -> torch.Tensor:
        """An output without its graph; on a CPU, a small one is copied into a block."""
        output = output.detach()
        return output if output.device.type != "cpu" or output.nbytes >= BLOCK else self.blocks.copy(output)


class Reuse(TorchDispatchMode):
    """Takes outputs from those that were kept, instead of computing them; what is not there is computed."""

    def __init__(self, kept: deque):
        super().__init__()
        self.kept, self.place = kept, inside(outputs=self, recomputation=True)

    def __enter__(self):
        self.place.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        self.place.__exit__()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.kept and is_kept(func.name()):
            return self.kept.popleft()
        return func(*args, **kwargs or {})

    def compute(self, output_of: Callable[[], torch.Tensor]) -> torch.Tensor:
        """An output that was kept."""
        return self.kept.popleft() if self.kept else output_of()


def compute_once(output_of: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The output of a part of a layer that is one node of the graph; kept and reused, if outputs of this layer are."""
    return Inside.outputs.compute(output_of) if Inside.outputs else output_of()


def recompute_all() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts of a checkpointed layer of which nothing is kept, for its forward pass and its recomputation; ``context_fn`` of
    torch's ``checkpoint``."""
    return nullcontext(), inside(recomputation=True)


def keep_and_reuse(blocks: Blocks) -> tuple[AbstractContextManager, AbstractContextManager]:
    """The same, where outputs of linear layers and of the attention are kept.

    Args:
        blocks: of the model.
    """
    kept: deque[Any] = deque()
    return Keep(kept, blocks), Reuse(kept)


def mark_linear_layers(model: PreTrainedModel) -> None:
    """Let the linear layers of a model be known as such to :class:`Keep` and :class:`Reuse`; but not those of its adapter, nor
    those that it adapts, which :func:`compute_once` computes.

    Args:
        model: of transformers, with its adapter if it has one.
    """
    layers = model.get_decoder().layers
    adapted = {layer.base_layer for layer in layers.modules() if isinstance(layer, LoraLayer) and not layer.lora_variant}
    for name, module in layers.named_modules():
        if isinstance(module, torch.nn.Linear) and ".lora_" not in name and module not in adapted:
            module.forward = marked(module.forward)  # type: ignore[method-assign]


def marked(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The forward pass of a linear layer whose output is kept."""

    def forward_inside(*args, **kwargs) -> torch.Tensor:
        with inside(linear=True):
            return forward(*args, **kwargs)

    return forward_inside
