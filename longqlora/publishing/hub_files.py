"""The files of a trained system that are published, and their text without paths of this machine."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from longqlora.modeling.model_files import VOCABULARY, check_safetensors, tokenizer_files, weight_files

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
VERBATIM = (*VOCABULARY, "chat_template.jinja")  # the paths in them, if any, are not of this machine
SYSTEM_FOLDERS = ("bin", "boot", "dev", "etc", "lib", "lib64", "proc", "run", "sbin", "sys", "usr")  # the same on all machines
USERS_FOLDERS = ("data", "gpfs", "home", "lustre", "mnt", "project", "projects", "root", "scratch", "tmp", "Users", "work")
ABSOLUTE_PATH = re.compile(r"(?:(?<=file://)|(?<![\w.…~/:<>+-]))/([\w.@+~-]+)/(?:[\w.@+~-]+/)*([\w.@+~*-]+)")


def read_json(file: Path) -> dict:
    """The contents of a JSON file.

    Raises:
        ValueError: if it is not JSON, for example because a run was cut off while it was written.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: is not JSON ({error}); delete it and run the workflow again") from None


def files_of_model(results: Path, system: str) -> list[Path]:
    """The files of a model folder that belong to the model, after a check that it is complete.

    Raises:
        ValueError: if it is not, or the experiment has no such system.
    """
    folder = results / "models" / system
    there = sorted(path.name for path in (results / "models").glob("*") if path.is_dir())
    if system not in there:
        known = f"trained systems there: {', '.join(there)}" if there else f"{results}/models holds no trained system"
        raise ValueError(f"{folder}: there is no such model folder; {known}")
    weights = weight_files(folder)
    for file in weights:
        check_safetensors(file)
    tokenizer = tokenizer_files(str(folder), with_chat_template=True)
    needed = [folder / name for name in ("README.md", "config.json", "generation_config.json")]
    missing = [file.name for file in needed if not file.is_file()]
    missing += [] if any(file.name in VOCABULARY for file in tokenizer) else ["tokenizer.json"]
    if missing:
        raise ValueError(f"{folder}: is incomplete, {' and '.join(missing)} is missing; run the workflow again")
    read_json(folder / "config.json")
    more = [*folder.glob("*.safetensors.index.json"), *folder.glob("merge_report.json")]
    return [*needed, *weights, *tokenizer, *more]


def files_of_adapter(folder: Path) -> list[Path]:
    """The files of an adapter.

    Raises:
        ValueError: if one is missing or damaged.
    """
    files = [folder / name for name in ADAPTER_FILES]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{folder}: is incomplete, {' and '.join(missing)} is missing; run the workflow again")
    check_safetensors(files[1])
    return files


def base_paths(results: Path, system: str) -> Iterator[str]:
    """Yield the models that a system was trained on, as its training cards have them: the newest first, the base model last.

    Raises:
        ValueError: if a training card is missing or incomplete.
    """
    while True:
        card = results / "training" / f"{system}.json"
        if not card.is_file():
            raise ValueError(f"{card}: the training card of {system} is missing; run the workflow again")
        if not (base := read_json(card).get("base_model")):
            raise ValueError(f"{card}: does not say what the model was trained on (base_model); run the workflow again")
        yield base
        path = Path(base)
        if path.parent.name != "weights" or path.parent.parent.name != results.resolve().name:
            return
        system = path.name


def without_base_path(card: str, path: str, base: str) -> str:
    """A model card that names the base model by its hub id, or the name of its folder, in the place of its path."""
    return card.replace(f"`{path}`", f"`{base}`")


def adapter_config(folder: Path, base: str) -> bytes:
    """The ``adapter_config.json`` of an adapter for another name of its base model."""
    config = read_json(folder / ADAPTER_FILES[0])
    return json.dumps(config | {"base_model_name_or_path": base}, indent=2).encode()


def without_local_paths(content: Path | bytes) -> tuple[Path | bytes, dict[str, str]]:
    """A text without the folders of its absolute paths, and these paths with what replaces them.

    A path is absolute if it has at least two parts, and the first is a usual place of users' files, or a folder of this machine
    that is not one of the system.
    """
    text = (content if isinstance(content, bytes) else content.read_bytes()).decode("utf-8")
    found: dict[str, str] = {}

    def shorten(match: re.Match) -> str:
        first, last = match[1], match[2]
        if first in SYSTEM_FOLDERS or not (first in USERS_FOLDERS or os.path.isdir(f"/{first}")):
            return match[0]
        found[match[0]] = f"…/{last}"
        return found[match[0]]

    short = ABSOLUTE_PATH.sub(shorten, text)
    return (short.encode() if found else content), found
