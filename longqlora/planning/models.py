"""The ``config.json`` of the models of an experiment, which is all that a plan needs of them."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from longqlora.config.completed import Experiment
from longqlora.data.hub import is_hub_id, split_revision
from longqlora.preflight import after_training, model_config, read_config


def config_to_plan(experiment: Experiment, folders: Mapping[str, str], path: str) -> dict:
    """The ``config.json`` of a model: of a folder, of the hub, or as the workflow is going to write it.

    Args:
        experiment: names the model.
        folders: folders to read in place of models, by the models' paths in the configuration.
        path: of the model in the configuration.

    Raises:
        ValueError: if it cannot be read; the message says how to give it.
    """
    read = partial(config_to_plan, experiment, folders)
    if path in folders:
        return read_folder(Path(folders[path]), path)
    if trained_on := [system.base for system in experiment.systems.values() if system.base and system.model == path]:
        base = experiment.systems[str(trained_on[0])]
        return after_training(read(base.model), base)
    if is_hub_id(path):
        return read_from_hub(path)
    return model_config(experiment, path) or read_folder(Path(path), path)


def read_folder(folder: Path, path: str) -> dict:
    """The ``config.json`` in a folder.

    Args:
        folder: to read.
        path: of the model in the configuration, for the message.

    Raises:
        ValueError: see :func:`config_to_plan`.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{path}: {folder} holds no config.json; {how_to_give(path)}")
    return read_config(folder)


def read_from_hub(path: str) -> dict:
    """The ``config.json`` of a model on the hub, or in the hub's cache.

    Raises:
        ValueError: see :func:`config_to_plan`.
    """
    from huggingface_hub import hf_hub_download

    name, revision = split_revision(path)
    try:
        file = hf_hub_download(name, "config.json", revision=revision)
    except OSError as error:  # all errors of the hub and its cache are
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f"{path}: there is no such folder, and its config.json cannot be read from the hub ({reason}); {how_to_give(path)}"
        ) from None
    return read_config(Path(file).parent)


def how_to_give(path: str) -> str:
    """How a user gives the ``config.json`` of a model that cannot be read."""
    return f"a plan needs no other file of a model: give a folder that holds it, --model {path}=FOLDER"
