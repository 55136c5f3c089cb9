"""A device whose streams work as late as they are allowed to, and whose memory is reused as soon as it is allowed to be.

What a model computes is computed twice: at once, on the CPU, as usual; and on the device, where every operation is only queued,
on the current stream, and reads and writes memory of the device. At the end, the streams run in the worst order: all that one
can do before anything that another one need not have done yet. A copy without its synchronization then reads memory too early
or too late, and numbers on the device differ from those on the CPU.

Memory is allocated as torch does it on CUDA: a block belongs to the stream that was current when it was allocated, is free as
soon as its tensor is, and is given to the next tensor of that stream and size, however much of the queue is still to be done.
A block of pinned memory of the host is free when the streams that copied from or to it have done what they were given until
its tensor was. What is free is overwritten.
"""

import weakref
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

GARBAGE = 0xFF  # as every byte of a floating-point number, not a number


class Stream:
    """Operations that run in their order; a wait is a pair: another stream, and how many of its operations must be done."""

    def __init__(self, device=None):
        self.queue, self.done = [], 0

    def wait_stream(self, other: "Stream") -> None:
        self.queue.append((other, len(other.queue)))

    def take_step(self) -> bool:
        """Run the next operation, if there is one that need not wait; return whether there was."""
        if self.done == len(self.queue):
            return False
        operation = self.queue[self.done]
        if callable(operation):
            operation()
        elif operation[0].done < operation[1]:
            return False
        self.done += 1
        return True


@dataclass
class Block:
    """Memory of a tensor, and the streams that have used it, if it is pinned memory of the host."""

    memory: torch.Tensor
    stream: Stream
    pinned: bool = False
    users: set = field(default_factory=set)


class SimulatedDevice(TorchDispatchMode):
    """Also stands in for torch's module of the device (``torch.cuda``)."""

    Stream = Stream

    def __init__(self):
        super().__init__()
        self.computing, self.host = Stream(), Stream()
        self.current = self.computing
        self.streams = [self.computing, self.host]
        self.blocks: dict[int, Block] = {}  # by storage
        self.free: dict[tuple, list[torch.Tensor]] = defaultdict(list)

    def current_stream(self, device=None) -> Stream:
        return self.current

    @contextmanager
    def stream(self, stream: Stream):
        former, self.current = self.current, stream
        if stream not in self.streams:
            self.streams.append(stream)
        try:
            yield
        finally:
            self.current = former

    # Memory

    def host_buffer(self, tensor: torch.Tensor) -> torch.Tensor:
        """In place of :func:`longqlora.training.offloading.host_buffer`."""
        with _disable_current_modes():
            buffer = torch.empty_like(tensor)
        self.allocate(buffer, pinned=True)
        return buffer

    def allocate(self, tensor: torch.Tensor, *, pinned: bool = False) -> Block:
        storage, stream = tensor.untyped_storage(), self.current
        size = storage.nbytes()
        waiting = self.free[stream, size]
        memory = waiting.pop() if waiting and not pinned else torch.full((size,), GARBAGE, dtype=torch.uint8)
        block = self.blocks[storage._cdata] = Block(memory, stream, pinned)
        weakref.finalize(storage, self.release, storage._cdata).atexit = False
        return block

    def release(self, key: int) -> None:
        block = self.blocks.pop(key)
        stream = self.host if block.pinned else block.stream
        for user in block.users:
            stream.wait_stream(user)
        stream.queue.append(lambda: block.memory.fill_(GARBAGE))
        if not block.pinned:
            self.free[stream, len(block.memory)].append(block.memory)

    def on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same tensor in memory of the device. One from before the simulation is there already."""
        storage = tensor.untyped_storage()
        if not storage.nbytes():
            return tensor
        block = self.blocks.get(storage._cdata)
        if block is None:
            block = self.allocate(tensor)
            block.memory = torch.tensor([], dtype=torch.uint8).set_(storage).clone()
        if block.pinned:
            block.users.add(self.current)
        memory = block.memory.view(tensor.dtype)
        return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def new_on_device(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Memory of the device for a result; None if it is a view of what was given, or that itself."""
        storage = tensor.untyped_storage()
        if storage._cdata in self.blocks or not storage.nbytes():
            return None
        self.allocate(tensor)
        return self.on_device(tensor)

    # Operations

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = tree_map_only(torch.Tensor, self.on_device, (args, kwargs or {}))
        result = function(*args, **(kwargs or {}))
        targets = [self.new_on_device(x) if isinstance(x, torch.Tensor) else None for x in tree_leaves(result)]
        if not function.__name__.startswith("empty"):
            self.current.queue.append(lambda: compute(function, given, targets))
        return result

    def run(self, *, copies_first: bool) -> None:
        """Run all that is queued, copies as early as possible, or as late."""
        order = sorted(self.streams, key=lambda stream: (stream is not self.host, (stream is self.computing) == copies_first))
        while any(stream.take_step() for stream in order):
            pass
        assert all(stream.done == len(stream.queue) for stream in order), "the streams wait for each other"

    def time_taken(self, copy_time: int) -> int:
        """How long the computing stream takes, if each of its operations takes 1 and those of other streams ``copy_time``."""
        ends: dict[Stream, list[int]] = {stream: [0] for stream in self.streams}
        progress = True
        while progress:
            progress = False
            for stream, times in ends.items():
                while len(times) <= len(stream.queue):
                    operation = stream.queue[len(times) - 1]
                    if callable(operation):
                        times.append(times[-1] + (1 if stream is self.computing else copy_time))
                    elif len(ends[operation[0]]) > operation[1]:
                        times.append(max(times[-1], ends[operation[0]][operation[1]]))
                    else:
                        break
                    progress = True
        return ends[self.computing][-1]


def compute(function, given, targets) -> None:
    """Run an operation on memory of the device."""
    args, kwargs = given
    for target, found in zip(targets, tree_leaves(function(*args, **kwargs)), strict=True):
        if target is not None:
            target.copy_(found)
