"""Devices: what a CPU or GPU computes and keeps weights in, and whether the installed torch has kernels for it."""

import ctypes
import os
import sys

import torch


def compute_dtype(device: torch.device) -> torch.dtype:
    """The type that a device computes fastest in: bfloat16 where the hardware has it, float16 on older GPUs (V100), float32
    on a CPU that would only emulate bfloat16."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def weight_dtype(device: torch.device) -> torch.dtype:
    """The type that weights are kept in if the configuration leaves it open: the autocast type on a GPU, float32 on a CPU."""
    return compute_dtype(device) if device.type == "cuda" else torch.float32


def find_device(name: str) -> torch.device:
    """``cuda`` or ``cpu`` as a device; on a CPU, memory is from now on kept for reuse (:func:`keep_freed_memory`).

    Raises:
        ValueError: if the configuration asks for a GPU and torch sees none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda is configured, but torch sees no GPU on this machine; 'cpu' would run without one")
    if name == "cpu":
        keep_freed_memory()
        return torch.device(name)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))  # of this process, where torchrun started several
    check_kernels(device)
    torch.cuda.set_device(device)
    return device


def check_kernels(device: torch.device) -> None:
    """Check that the installed torch can compute on a GPU at all.

    A build has kernels for a list of architectures (``sm_80`` runs on 8.0 and newer 8.x), and perhaps code that the driver
    compiles for newer ones (``compute_90``).

    Raises:
        ValueError: if it has none for this card; the message names the build that has.
    """
    major, minor = torch.cuda.get_device_capability(device)
    for architecture in torch.cuda.get_arch_list():
        kind, number = architecture.rstrip("af").split("_")  # sm_90a: what is for one architecture alone
        built_major, built_minor = int(number[:-1]), int(number[-1])
        runs_as_it_is = kind == "sm" and built_major == major and built_minor <= minor
        if runs_as_it_is or (kind == "compute" and (built_major, built_minor) <= (major, minor)):
            return
    name, build = torch.cuda.get_device_name(device), f"torch {torch.__version__} (CUDA {torch.version.cuda})"
    advice = "a newer build of torch has them"
    if (major, minor) < (
        7,
        5,
    ):  # CUDA 13 dropped what is older than Turing; torch up to 2.14 has a build for 12.6 too
        advice = (
            "install the build of torch 2.13 for CUDA 12.6 (cu126, from PyTorch's own package index), which has them for the "
            "V100 and older cards"
        )
    raise ValueError(
        f"{name} has compute capability {major}.{minor}, for which {build} has no kernels "
        f"(it has {' '.join(torch.cuda.get_arch_list())}): {advice}"
    )


def keep_freed_memory() -> None:
    """Let this process keep freed memory, as torch does on a GPU, where the C library is glibc.

    By default glibc gives large tensors back to the system when they are freed, and the page faults of the next ones are a
    tenth of the time of a small model's training step. What it keeps is torn into pieces that fit no other tensor, at worst
    to three times what is in use; so tensors of 8 MiB and more are mapped by themselves, in the huge pages that a job asks
    torch for (:mod:`longqlora.jobs.log`), which fault seldom.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, 8 * 2**20)  # M_MMAP_THRESHOLD: fixed, where glibc would raise it as tensors are freed
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


def name_of(dtype: torch.dtype) -> str:
    """``bfloat16`` of ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
