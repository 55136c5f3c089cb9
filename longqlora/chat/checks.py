"""Checks of the model and the adapter that a user names on the command line, before torch is imported."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

from longqlora.access import model_problem, repository, tokenizer_problem
from longqlora.config.settings import RopeExtension
from longqlora.data.hub import is_hub_id
from longqlora.modeling.model_files import tokenizer_files, weight_files
from longqlora.preflight import misspelled_folder, read_config

log = logging.getLogger(__name__)

ADAPTER = "adapter_config.json"


def model_problems(path: str) -> Iterator[str]:
    """Yield why a model, or its tokenizer, cannot be loaded."""
    folder = Path(path)
    if is_hub_id(path):
        yield from misspelled_folder(path)
        yield from filter(None, (problem(path, repository) for problem in (model_problem, tokenizer_problem)))
    elif not folder.exists():
        yield f"there is no folder {path} on this machine, and it is not a hub id (owner/name) either"
    elif not folder.is_dir():
        yield f"{path} is a file; give the folder of a model, or a hub id (owner/name)"
    elif (folder / ADAPTER).is_file() and not (folder / "config.json").is_file():
        base = json.loads((folder / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path") or "BASE_MODEL"
        yield f"{path} is an adapter, not a model; name its base as the model: {base} --adapter {path}"
    elif not (folder / "config.json").is_file():
        yield f"{path} is not the folder of a model: it holds no config.json"
    else:
        yield from folder_problems(folder)


def folder_problems(folder: Path) -> Iterator[str]:
    """Yield what is missing in the folder of a model."""
    try:
        read_config(folder)
        weight_files(folder)
    except ValueError as error:
        yield str(error)
        return
    if not tokenizer_files(str(folder)):
        published = folder.parent.parent / "models" / folder.name
        hint = (
            f"the published model is in {published}" if published.is_dir() else "copy the files of its base's tokenizer into it"
        )
        yield f"{folder} holds no tokenizer (tokenizer.json); {hint}"


def adapter_problems(path: str) -> Iterator[str]:
    """Yield why the folder of an adapter cannot be used."""
    if not Path(path).is_dir():
        yield f"--adapter: there is no folder {path}"
    elif not (Path(path) / ADAPTER).is_file():
        is_model = (Path(path) / "config.json").is_file()
        yield f"--adapter: {path} holds no {ADAPTER}" + (f"; it is a model: longqlora chat {path}" if is_model else "")


def training_card(adapter: str, model: str) -> dict | None:
    """The training card of an adapter of this workflow, in ``results/<experiment>/training``; None for another adapter.

    Args:
        adapter: its folder.
        model: the model that it is put on; a warning says if the adapter was trained on another one.
    """
    folder = Path(adapter).resolve()
    file = folder.parent.parent / "training" / f"{folder.name}.json"
    if not file.is_file():
        log.warning("%s: there is no training card (%s), so the model keeps its own context", adapter, file)
        return None
    card = json.loads(file.read_text(encoding="utf-8"))
    if Path(card["base_model"]).resolve() != Path(model).resolve():
        log.warning("%s was trained on %s, not on %s", adapter, card["base_model"], model)
    return card


def extension_in(card: dict) -> RopeExtension:
    """How the context was extended in a training, by its training card."""
    return RopeExtension(
        scaling=card["rope_scaling"],
        target_context=card["target_context"],
        factor=card["rope_factor"],
        theta=card["rope_theta"],
    )
