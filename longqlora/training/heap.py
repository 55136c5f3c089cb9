"""Returns what is free in a training process's heap to the system. Only on a CPU, and only with glibc."""

import os
import time

import torch

from longqlora.modeling.devices import function_of_glibc


class Heap:
    """When this process returned memory, and what it held then.

    Returning it twice in each step of the demo (0.2 s) took a quarter of the time, for page faults of what is used again. In
    steps of 6 s, it took no time that could be measured.
    """

    INTERVAL = 1  # second
    GROWTH = 128 * 2**20  # bytes
    returned_at, held = float("-inf"), 0


def return_freed_memory(device: torch.device) -> None:
    """Return what is free in this process's heap to the system, because the holes between the tensors of one half of a training
    step do not fit those of the other; unless little was added, or it was just done."""
    malloc_trim = function_of_glibc("malloc_trim", device)
    if malloc_trim and time.monotonic() - Heap.returned_at > Heap.INTERVAL and held_memory() - Heap.held > Heap.GROWTH:
        malloc_trim(0)
        Heap.returned_at, Heap.held = time.monotonic(), held_memory()


def held_memory() -> int:
    """Main memory of this process, in bytes."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
