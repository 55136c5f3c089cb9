"""What a result depends on: the project's own files behind a script, and digests to stamp results with.

Standard library only: the workflow imports it on every start.
"""

import ast
import hashlib
import json
import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = "longqlora"
RECORDED = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


def imported_modules(path: Path) -> set[str]:
    """Dotted names of the package's modules that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)  # "from longqlora import tokens"
    return {name for name in names if name.split(".")[0] == PACKAGE}


def code_of(script: Path, root: Path) -> list[str]:
    """A script and the package's files that it runs on, directly or through other modules: paths relative to ``root``, sorted.

    Snakemake reruns a job when the script's own file has a newer date but knows nothing of what it imports; a rule that names
    these files as an input is rerun when the contents of one of them change, and only then.

    Args:
        script: file whose imports are followed (``import longqlora.x``, ``from longqlora.x import y``).
        root: folder that holds the package and the script.
    """
    found, pending = {script}, [script]
    while pending:
        for name in imported_modules(pending.pop()):
            file = root.joinpath(*name.split(".")).with_suffix(".py")
            if file.is_file() and file not in found:
                found.add(file)
                pending.append(file)
    return sorted(file.relative_to(root).as_posix() for file in found)


def digest_of_files(paths: Iterable[str]) -> str:
    """SHA-256 over the contents of files in the given order, first 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:16]


def digest_of_file(path: str) -> str:
    """SHA-256 of a file of any size, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python, of this project where it is installed, and of the packages that a training rests on."""
    found = {"python": platform.python_version()}
    for package in (PACKAGE, *RECORDED):
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


def digest_of_values(values: object) -> str:
    """SHA-256 of anything that JSON can hold, first 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
