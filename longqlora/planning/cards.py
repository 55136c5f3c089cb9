"""GPUs by name, with their memory and the rates that a plan expects of them, and a probe of the device that is present.

Only the H100 was measured (benchmarks/RESULTS.md, "On a GPU"). For every other card the rates are extrapolated from the
published ones: it is taken to reach the same shares of them.
"""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from longqlora.config.settings import Device

GIB = 2**30
MATMUL_SHARE = 780 / 989.4  # of the H100's published tensor rate that a product of 8192 × 8192 matrices in bfloat16 reached
COPY_SHARE = 2.96 / 3.35  # of its published bandwidth that a copy of 1 GiB reached (read + write)


@dataclass(frozen=True)
class Card:
    """A device to plan for.

    Attributes:
        name: of the device.
        memory: bytes that torch can use; None: unknown (a CPU).
        compute: the dtype that it computes in: ``bfloat16``, ``float16`` (V100, T4) or, on a CPU, ``float32``.
        matmul_rate: floating-point operations per second in a large matrix product in this dtype; None: unknown.
        bandwidth: bytes per second of a large copy, read + write; None: unknown.
    """

    name: str
    memory: int | None
    compute: str
    matmul_rate: float | None
    bandwidth: float | None

    @property
    def device(self) -> Device:
        """``cpu`` or ``cuda``."""
        return "cpu" if self.compute == "float32" else "cuda"


# By name: GiB that torch can use, published dense 16-bit tensor rate with sums in float32 (TFLOP/s), published bandwidth
# (GB/s), and whether the card computes in bfloat16. Rates and bandwidths are from NVIDIA's data sheets, for GeForce and RTX
# cards from its papers on their architectures (Ampere GA102, Ada, Blackwell), for the A10G from Amazon's description of EC2 G5.
# The memory is the total in torch's messages about exhausted memory ("has a total capacity of … GiB"); it is less than the
# nominal one, most of all where error correction takes a share.
PUBLISHED: dict[str, tuple[float, float, float, bool]] = {
    "V100-16GB": (15.8, 125, 900, False),
    "V100-32GB": (31.7, 125, 900, False),
    "T4": (14.6, 65, 300, False),
    "RTX-3090": (23.6, 71, 936, True),
    "RTX-4080": (15.6, 97.5, 717, True),
    "RTX-4090": (23.5, 165.2, 1008, True),
    "RTX-5090": (31.4, 209.5, 1792, True),
    "A10G": (22.0, 70, 600, True),
    "L4": (22.0, 121, 300, True),
    "RTX-A6000": (47.4, 154.8, 768, True),
    "RTX-6000-Ada": (47.4, 364.2, 960, True),
    "A40": (44.4, 149.7, 696, True),
    "L40S": (44.4, 362, 864, True),
    "A100-40GB": (39.4, 312, 1555, True),
    "A100-80GB": (79.1, 312, 2039, True),
    "H100-PCIe": (79.1, 756, 2000, True),
    "H100-80GB": (79.2, 989.4, 3350, True),
    "H200": (139.8, 989.4, 4800, True),
    "B200": (178.3, 2250, 8000, True),
}
WITHOUT_MEANING = {"nvidia", "tesla", "geforce", "generation", "gpu", "pcie", "80gb", "hbm2", "hbm2e", "hbm3", "hbm3e"}
"""Words of a name in torch that distinguish no card of the table, besides the sockets (SXM2 and so on)."""


def card_named(name: str) -> Card:
    """A GPU by its name, as torch gives it (``Tesla V100-SXM2-32GB``) or as in the table (``v100-32gb``).

    Raises:
        ValueError: if the name is unknown; the message lists the names.
    """
    words = words_of(name)
    known = [key for key in PUBLISHED if words_of(key) <= words]
    best = max(known, key=lambda key: len(words_of(key)), default=None)
    if best is None or not all(word in WITHOUT_MEANING or word.startswith("sxm") for word in words - words_of(best)):
        near = [key for key in PUBLISHED if words_of(key) & words] or get_close_matches(name, PUBLISHED, n=3)
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"{name!r} is no GPU that is known here{meant}; known are {', '.join(PUBLISHED)}")
    memory, tera_flops, gigabytes, has_bfloat16 = PUBLISHED[best]
    return Card(
        name=best,
        memory=round(memory * GIB),
        compute="bfloat16" if has_bfloat16 else "float16",
        matmul_rate=MATMUL_SHARE * tera_flops * 1e12,
        bandwidth=COPY_SHARE * gigabytes * 1e9,
    )


def words_of(name: str) -> set[str]:
    """The words of a card's name, in lower case."""
    return set(re.findall(r"[a-z0-9]+", name.lower()))


def card_with_memory(memory: str) -> Card:
    """A GPU of which only the memory is known, such as ``24GB`` (of 2^30 bytes each, as vendors count). It computes in
    bfloat16, and its rates are unknown.

    Raises:
        ValueError: if the memory is not a number of GB above 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:GB|GiB)", memory.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise ValueError(f"{memory!r} is no memory of a GPU: write it in GB, such as 24GB")
    return Card(f"GPU with {found[1]} GB", round(float(found[1]) * GIB), "bfloat16", None, None)


# The device that is present


def probe(device: Device) -> Card:
    """The device that is present, with measured rates; takes two seconds, and on a GPU some more for torch to start.

    On a CPU, CPU time is measured, not the clock: the rates are those that torch's threads reach if no other job disturbs them.

    Raises:
        ValueError: if torch sees no GPU, or has no kernels for it.
    """
    import torch

    from longqlora.modeling.devices import compute_dtype, dtype_name, find_device

    where = find_device(device)
    dtype, on_gpu = compute_dtype(where), where.type == "cuda"
    size, num_bytes = (8192, GIB) if on_gpu else (1024, GIB // 4)
    left, right = (torch.randn(size, size, dtype=dtype, device=where) for _ in range(2))
    product = torch.empty_like(left)
    matmul_seconds = shortest(lambda: torch.mm(left, right, out=product), where)
    source = torch.ones(num_bytes, dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    copy_seconds = shortest(lambda: target.copy_(source), where)
    return Card(
        name=torch.cuda.get_device_name(where) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        memory=torch.cuda.get_device_properties(where).total_memory if on_gpu else None,
        compute=dtype_name(dtype),
        matmul_rate=2 * size**3 / matmul_seconds,
        bandwidth=2 * num_bytes / copy_seconds,
    )


def shortest(function: Callable[[], Any], device: Any, seconds: float = 1.0) -> float:
    """The shortest time of several calls, in seconds; on a CPU, CPU time per thread.

    Args:
        function: to call.
        device: of torch, that it runs on.
        seconds: by the clock, that the calls take in all; there are at least two, after one that is not timed.
    """
    function()
    return min(timed_calls(function, device, seconds))


def timed_calls(function: Callable[[], Any], device: Any, seconds: float) -> Iterator[float]:
    import torch

    end, calls = time.perf_counter() + seconds, 0
    while calls < 2 or time.perf_counter() < end:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            started = time.perf_counter()
            function()
            torch.cuda.synchronize(device)
            yield time.perf_counter() - started
        else:
            started = time.process_time()
            function()
            yield (time.process_time() - started) / torch.get_num_threads()
        calls += 1
