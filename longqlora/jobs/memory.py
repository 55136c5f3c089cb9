"""Memory of a job: what it took, and what to change when it is exhausted."""

import re
import resource
from contextlib import contextmanager

EXHAUSTED = re.compile(
    r"out of memory"  # torch (CUDA, HIP), the CUDA driver, bitsandbytes, NCCL
    r"|ALLOC_FAILED"  # cuBLAS, cuDNN, cuSPARSE
    r"|OUT_OF_MEMORY|MemoryAllocation"  # CUDA's names of its errors
    r"|can(no|')t allocate|not enough memory|allocate memory|bad_alloc|bad allocation",  # a CPU
    re.IGNORECASE,
)
KINDS = ("MemoryError", "OutOfMemoryError", "ArrowMemoryError")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that the memory of the GPU or the machine is exhausted."""
    seen: BaseException | None = error
    while seen is not None:
        if type(seen).__name__ in KINDS:
            return True
        if isinstance(seen, (RuntimeError, OSError)) and EXHAUSTED.search(str(seen)):
            return True
        seen = seen.__cause__
    return False


@contextmanager
def memory_explained(what: str, advice: str):
    """Say of an exhausted memory what was being done and what to change.

    Args:
        what: was being done, with its sizes: "evaluating 8192 tokens in bfloat16".
        advice: settings to change, the cheapest first.

    Raises:
        MemoryError: in the place of an error that says so in other words.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) and error.args and str(error.args[0]).startswith("out of memory"):
            raise  # explained already
        if not is_out_of_memory(error):
            raise
        raise MemoryError(f"out of memory {what}. {advice} ({error})") from error


def peak_memory(device) -> dict[str, int]:
    """Most memory in bytes that this process has held so far: ``peak_memory_bytes``, resident on a CPU; on a GPU that of its
    tensors, and as ``peak_reserved_bytes`` with what the allocator keeps beside them.

    Args:
        device: a ``torch.device``.
    """
    if device.type != "cuda":
        return {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}  # Linux counts in kibibytes
    import torch

    return {
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }
