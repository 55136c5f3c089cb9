"""Facts about the machine and its software, for the training card and the report."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RECORDED = ("longqlora", "torch", "transformers", "peft", "bitsandbytes", "accelerate")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages in :data:`RECORDED` that are installed."""
    found = {"python": platform.python_version()}
    for package in RECORDED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # longqlora: the workflow also runs from a clone, without an installation
            continue
    return found


def machine() -> dict[str, str | int]:
    """The machine that this process runs on: its system, its processor, and the number of cores that the process may use."""
    processor, cpuinfo = platform.processor(), Path("/proc/cpuinfo")
    if cpuinfo.exists():  # on Linux, platform does not know the processor's name
        names = [
            line.split(":", 1)[1].strip()
            for line in cpuinfo.read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"system": platform.platform(), "processor": processor, "cores": cores}


def checkout() -> str | None:
    """The commit of the checkout that this code is in, as ``git describe`` has it; None without a checkout or git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(root), "describe", "--tags", "--always", "--dirty"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout.strip() or None
