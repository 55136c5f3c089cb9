"""Memory of a job: its peak, and errors that name the settings to change when memory is exhausted."""

import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

EXHAUSTED = re.compile(
    r"out of memory"  # torch (CUDA, HIP), the CUDA driver, bitsandbytes, NCCL
    r"|ALLOC_FAILED"  # cuBLAS, cuDNN, cuSPARSE
    r"|OUT_OF_MEMORY|MemoryAllocation"  # names of CUDA's errors
    r"|can(no|')t allocate|not enough memory|allocate memory|bad_alloc|bad allocation",  # a CPU
    re.IGNORECASE,
)
KINDS = ("MemoryError", "OutOfMemoryError", "ArrowMemoryError")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one of its causes, says that the memory of the GPU or the machine is exhausted."""
    seen: BaseException | None = error
    while seen is not None:
        if type(seen).__name__ in KINDS:
            return True
        if isinstance(seen, (RuntimeError, OSError)) and EXHAUSTED.search(str(seen)):
            return True
        seen = seen.__cause__
    return False


@contextmanager
def memory_explained(what: str, advice: str) -> Iterator[None]:
    """Explain an out-of-memory error: what was running, and which settings to change.

    Args:
        what: the activity and its sizes, such as "evaluating 8192 tokens in bfloat16".
        advice: settings to change, those with the smallest disadvantage first.

    Raises:
        MemoryError: in place of any error that reports exhausted memory.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) and error.args and str(error.args[0]).startswith("out of memory"):
            raise  # already explained
        if not is_out_of_memory(error):
            raise
        raise MemoryError(f"out of memory {what}. {advice} ({error})") from error


def total_memory(device: str) -> int:
    """Memory of a device, in bytes: of the first GPU that this process sees (``cuda``), or of this machine (``cpu``), where a
    control group, such as a container or a job of SLURM, may allow less.

    Raises:
        ValueError: if torch sees no GPU.
    """
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ValueError(
                "device: cuda is configured, but torch sees no GPU: install its build for CUDA, or use device: cpu"
            )
        return torch.cuda.get_device_properties(0).total_memory
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *cgroup_limits()])


def cgroup_limits(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Yield the limits of memory of the control groups that this process is in, in bytes.

    Args:
        groups: lists them: ``0::/path`` (version 2), or ``number:controllers:/path`` (version 1).
        root: where they are mounted.
    """
    for line in groups.read_text(encoding="utf-8").splitlines() if groups.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        folder, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        group = folder / path.lstrip("/")
        for parent in (group, *group.parents):  # inside of a container, only the root exists
            with suppress(OSError, ValueError):  # ValueError: "max", which is no limit
                yield int((parent / name).read_text(encoding="ascii"))


def peak_memory(device: "torch.device") -> dict[str, int]:
    """Peak memory of this process so far, in bytes.

    Returns:
        ``peak_memory_bytes``: on a CPU the resident memory of the process, on a GPU the memory of its tensors.
        ``peak_reserved_bytes``, on a GPU only: all memory that torch's allocator has reserved.
    """
    if device.type != "cuda":
        return {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}  # ru_maxrss: KiB
    import torch

    return {
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }
