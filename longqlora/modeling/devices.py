"""Devices: the dtypes that a CPU or GPU computes and keeps weights in, and whether the installed torch supports the GPU."""

import ctypes
import os
import sys
from typing import Any

import torch

from longqlora.config.settings import Device


def compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype of autocast: on a GPU bfloat16 where the hardware has it, and float16 on older ones (V100); float32 on a CPU.

    CPUs differ in how fast bfloat16 is: with AVX512-BF16 and without AMX, products of matrices take twice the time of float32.
    In float32, results also do not depend on what the CPU has.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.float32


def weight_dtype(device: torch.device) -> torch.dtype:
    """The dtype of the weights in precision ``auto``: that of autocast on a GPU, float32 on a CPU."""
    return compute_dtype(device) if device.type == "cuda" else torch.float32


def find_device(name: Device) -> torch.device:
    """The device of this process; under torchrun, each process gets the GPU of its local rank.

    Raises:
        ValueError: if a GPU is asked for, and torch sees none or has no kernels for it.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda is configured, but torch sees no GPU on this machine; 'cpu' would run without one")
    if name == "cpu":
        return torch.device(name)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))  # torchrun sets LOCAL_RANK
    check_kernels(device)
    torch.cuda.set_device(device)
    return device


def check_kernels(device: torch.device) -> None:
    """Check that the installed build of torch has kernels for a GPU.

    A build has kernels for a list of architectures (``sm_80`` runs on compute capability 8.0 and newer 8.x), and may have code
    that the driver compiles for newer ones (``compute_90``).

    Raises:
        ValueError: if it has none for this GPU; the message names a build that has.
    """
    major, minor = torch.cuda.get_device_capability(device)
    for architecture in torch.cuda.get_arch_list():
        kind, number = architecture.rstrip("af").split("_")  # "a" and "f" mark architecture-specific kernels, as in sm_90a
        built_major, built_minor = int(number[:-1]), int(number[-1])
        is_compiled = kind == "sm" and built_major == major and built_minor <= minor
        if is_compiled or (kind == "compute" and (built_major, built_minor) <= (major, minor)):
            return
    name, build = torch.cuda.get_device_name(device), f"torch {torch.__version__} (CUDA {torch.version.cuda})"
    advice = "a newer build of torch has them"
    if (major, minor) < (7, 5):  # CUDA 13 has dropped GPUs older than Turing; torch up to 2.14 also has a build for CUDA 12.6
        advice = (
            "install the build of torch 2.13 for CUDA 12.6 (cu126, from PyTorch's own package index), which has them for the "
            "V100 and older cards"
        )
    raise ValueError(
        f"{name} has compute capability {major}.{minor}, for which {build} has no kernels "
        f"(it has {' '.join(torch.cuda.get_arch_list())}): {advice}"
    )


def keep_freed_memory(device: torch.device) -> None:
    """Let this process keep freed CPU memory for reuse, as torch does with GPU memory. Only on a CPU, and only with glibc.

    By default glibc returns the memory of a large tensor to the system when the tensor is freed. The page faults of the next
    tensor then take a tenth of the time of a small model's training step. Memory that is kept fragments, up to three times
    what is in use. Tensors of 8 MiB and more are therefore still mapped one by one; they are in huge pages
    (:mod:`longqlora.jobs.log`), which have few page faults.
    """
    if mallopt := function_of_glibc("mallopt", device):
        mallopt(-3, 8 * 2**20)  # M_MMAP_THRESHOLD: fixed, because glibc would raise it when tensors are freed
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


def function_of_glibc(name: str, device: torch.device) -> Any:
    """A function of the C library; None if it has none, or the device does not use its memory."""
    if device.type != "cpu" or sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), name, None)


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` of ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
