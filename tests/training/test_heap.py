"""Memory of a process that computes on a CPU: what is free in its heap goes back to the system, if that is worth it."""

import platform

import pytest
import torch

from longqlora.training.heap import Heap, held_memory, return_freed_memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's heap can be returned")
SIZE = 64 * 2**10  # bytes, which the heap holds


@pytest.fixture(autouse=True)
def begin(monkeypatch):
    """As if nothing had been returned yet."""
    monkeypatch.setattr(Heap, "returned_at", float("-inf"))
    monkeypatch.setattr(Heap, "held", held_memory())


def leave_holes(num_bytes: int) -> list[torch.Tensor]:
    """Free so many bytes between tensors that stay, which are returned."""
    tensors = [torch.ones(SIZE, dtype=torch.uint8) for _ in range(num_bytes // SIZE)]
    return tensors[::16]


def returned() -> int:
    """Bytes that went back to the system."""
    before = held_memory()
    return_freed_memory(torch.device("cpu"))
    return before - held_memory()


def test_much_that_is_free_between_tensors_goes_back_to_the_system():
    staying = leave_holes(3 * Heap.GROWTH)
    assert returned() > 2 * Heap.GROWTH
    assert all(tensor.sum() == SIZE for tensor in staying)


def test_little_is_kept_for_reuse():
    staying = leave_holes(Heap.GROWTH // 2)
    assert returned() < Heap.GROWTH // 8
    del staying


def test_what_was_just_returned_is_kept_for_reuse():
    for again in (False, True):
        staying = leave_holes(3 * Heap.GROWTH)
        assert (returned() < Heap.GROWTH // 8) is again
        del staying


def test_the_heap_of_a_process_on_a_gpu_is_left_alone(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", None)
    return_freed_memory(torch.device("cuda"))
