"""Keeps the inputs of layers in CPU memory between forward and backward pass, and copies them while the GPU computes.

Copies run on a stream of their own: to the host while the layer computes its forward pass, and back while the layer after it
computes its backward pass, so that two inputs are on the GPU at a time, that of the layer that computes and the next one.
:meth:`torch.Tensor.record_stream` is not used. It would free memory only when the host sees that a copy has ended, and the host
is layers ahead of the GPU. Instead, the computing stream waits for the copies before their memory is freed. The memory on the
host needs no such care: torch reuses a pinned block only when the copies from and to it have ended (``CachingHostAllocator``).
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel


def host_buffer(tensor: torch.Tensor) -> torch.Tensor:
    """Memory of the host for a copy of a tensor: pinned, unless the tensor is there already."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type != "cpu")


class Kept:
    """A tensor that waits for the backward pass.

    Attributes:
        on_host: its copy there.
        arriving: the copy that is on its way back, until the backward pass takes it.
        before: a weak reference to the tensor that was kept before it, which the backward pass needs next.
        wait: lets the computing stream wait for the copies.
    """

    def __init__(self, on_host: torch.Tensor, before: Callable[[], "Kept | None"], wait: Callable[[], None]):
        self.on_host, self.before, self.wait = on_host, before, wait
        self.arriving: torch.Tensor | None = None

    def __del__(self):
        if self.arriving is not None:  # a backward pass has failed, and the memory of the copy is about to be reused
            self.wait()


class Offloading(saved_tensors_hooks):
    """Inside of it, tensors that are saved for the backward pass go to the host. It is entered once for each layer of a model,
    which computes on one stream."""

    def __init__(self):
        super().__init__(self.pack, self.unpack)
        self.latest: Callable[[], Kept | None] = lambda: None
        self.leaving: list[torch.Tensor] = []  # referenced until they are copied
        self.device = torch.device("cpu")
        self.streams: Any = None  # torch's module of the device
        self.copying: Any = None  # a stream

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if self.leaving:
            self.wait()
            self.leaving.clear()

    def pack(self, tensor: torch.Tensor) -> Kept:
        """Start to copy a tensor to the host."""
        if self.copying is None:
            self.device, self.streams = tensor.device, torch.get_device_module(tensor.device)
            self.copying = self.streams.Stream(tensor.device)
        kept = Kept(host_buffer(tensor), self.latest, self.wait)
        self.latest = weakref.ref(kept)
        self.leaving.append(tensor)
        self.start_copy(tensor, kept.on_host)
        return kept

    def unpack(self, kept: Kept) -> torch.Tensor:
        """The tensor on its device again; the one before it starts to follow."""
        tensor = self.fetch(kept)
        self.wait()
        kept.arriving, self.latest = None, kept.before
        if before := kept.before():
            self.fetch(before)
        return tensor

    def fetch(self, kept: Kept) -> torch.Tensor:
        """Start to copy a tensor back, unless it is on its way. Its memory is the computing stream's, which will free it."""
        if kept.arriving is None:
            kept.arriving = torch.empty_like(kept.on_host, device=self.device)
            self.start_copy(kept.on_host, kept.arriving)
        return kept.arriving

    def start_copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy when the computing stream has done what it was given: made the source, or used the target's memory before."""
        self.copying.wait_stream(self.streams.current_stream(self.device))
        with self.streams.stream(self.copying):
            target.copy_(source, non_blocking=True)

    def wait(self) -> None:
        """Let the computing stream wait for the copies."""
        self.streams.current_stream(self.device).wait_stream(self.copying)


def offload_inputs(model: PreTrainedModel) -> None:
    """Let the layers of a model keep their inputs in CPU memory. They must have activation checkpointing, which saves nothing
    else, and must not change their input in place.

    Args:
        model: of transformers, with its adapter if it has one.
    """
    offloading = Offloading()
    for layer in model.get_decoder().layers:
        layer.forward = offloaded(layer.forward, offloading)


def offloaded(forward: Callable[..., Any], offloading: Offloading) -> Callable[..., Any]:
    """The forward pass of a layer, inside of :class:`Offloading`."""

    def forward_inside(*args, **kwargs):
        with offloading:
            return forward(*args, **kwargs)

    return forward_inside
