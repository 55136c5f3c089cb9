"""Facts of the machine and its software that a training card records."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RECORDED = ("longqlora", "torch", "transformers", "peft", "bitsandbytes", "accelerate")


def versions() -> dict[str, str]:
    """Versions of Python, of this project where it is installed, and of the packages that a training rests on."""
    found = {"python": platform.python_version()}
    for package in RECORDED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # the workflow runs from a clone too
            continue
    return found


def machine() -> dict[str, str | int]:
    """The machine that this process runs on: system, processor, and the cores that it may use."""
    processor, cpuinfo = platform.processor(), Path("/proc/cpuinfo")
    if cpuinfo.exists():  # Linux has no processor's name in platform
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = names[0] if names else processor
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"system": platform.platform(), "processor": processor, "cores": cores}
