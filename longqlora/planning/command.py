"""``longqlora plan``, and the file of a plan: what an experiment needs on a device."""

import argparse
import json
import logging
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from longqlora.config.completed import Experiment
from longqlora.config.experiment import load_experiment
from longqlora.config.settings import Device
from longqlora.config.validation import ConfigError, duplicate_keys
from longqlora.jobs.memory import total_memory
from longqlora.modeling.devices import compute_dtype, dtype_name
from longqlora.planning.cards import Card, card_named, card_with_memory, probe
from longqlora.planning.models import config_to_plan
from longqlora.planning.plan import Planner
from longqlora.planning.plan_table import format_contexts, format_plan

log = logging.getLogger(__name__)

UNKNOWN_GPU = Card("a GPU that is not known", memory=None, compute="bfloat16", matmul_rate=None, bandwidth=None)


def plan_command(options: argparse.Namespace) -> None:
    """Print the plan of an experiment.

    Raises:
        ValueError: if the configuration, the device or the models cannot be planned; the message says what would be right.
    """
    try:
        experiment = load_experiment(read_configuration(options.config))
    except ConfigError as error:
        raise ValueError(f"the configuration cannot run:\n{error}") from None
    replaced = dict(options.model)
    check_replaced(replaced, experiment)
    transformers.logging.set_verbosity_error()
    for library in ("bitsandbytes", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # they are for those who write code
    card = chosen_card(options, experiment)
    planner = Planner(experiment, card, partial(config_to_plan, experiment, replaced), tell=show_status)
    plan = planner.plan()
    show_status("")
    problems = {job["problem"] for job in plan["jobs"]}
    if None not in problems:
        raise ValueError("\n".join(sorted(problems)))
    if not options.json:
        print(format_plan(plan), flush=True)
    plan["longest_context"] = dict(planner.longest_contexts())
    show_status("")
    contexts = format_contexts(plan["longest_context"])
    if options.json or contexts:
        print(json.dumps(plan, indent=2) if options.json else f"\n{contexts}")


def show_status(text: str) -> None:
    """Show on a terminal what is being planned, in place of what was shown before; nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def check_replaced(folders: dict[str, str], experiment: Experiment) -> None:
    """Check that models whose ``config.json`` is in another folder belong to the experiment.

    Raises:
        ValueError: if one does not; the message lists those that do.
    """
    models = sorted({experiment.base_model, *(system.model for system in experiment.systems.values())})
    for path in folders:
        if path not in models:
            raise ValueError(f"--model {path}: the configuration has no such model; it has {', '.join(models)}")


def read_configuration(paths: list[str]) -> dict:
    """A configuration of several files, of which later ones override earlier ones, as Snakemake's ``--configfile`` reads them.

    Raises:
        ConfigError: if a key occurs twice in a file.
        ValueError: if a file is not YAML.
    """
    merged: dict = {}
    for path in paths:
        try:
            with open(path, encoding="utf-8") as file:
                found = yaml.safe_load(file)
            if repeated := list(duplicate_keys(path)):
                raise ConfigError(repeated)
        except UnicodeDecodeError:
            raise ValueError(f"{path}: is no text file; a configuration is YAML, such as config/config.yaml") from None
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: is not YAML ({' '.join(str(error).split())})") from None
        if not isinstance(found, dict):
            raise ValueError(f"{path}: expected keys with values, as in config/config.yaml")
        merge(merged, found)
    return merged


def merge(config: dict, changes: dict[Any, Any]) -> None:
    """Override values of a configuration in place, section by section."""
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            merge(config[key], value)
        else:
            config[key] = value


def chosen_card(options: argparse.Namespace, experiment: Experiment) -> Card:
    """The device that the command line names, or that of this machine on which the experiment runs.

    Raises:
        ValueError: see :func:`longqlora.planning.cards.card_named` and ``card_with_memory``.
    """
    if options.gpu:
        return card_named(options.gpu)
    return card_with_memory(options.gpu_memory) if options.gpu_memory else present_card(experiment.device)


def present_card(device: Device) -> Card:
    """The device of this machine, with its memory and measured rates; see :data:`UNKNOWN_GPU` for a machine without a GPU."""
    if device == "cpu":
        return replace(probe("cpu"), memory=total_memory("cpu"))
    return probe("cuda") if torch.cuda.is_available() else UNKNOWN_GPU


def write_plan(completed: dict, path: str) -> None:
    """Write the plan of an experiment for this machine as JSON; where there can be none, the reason as ``problem``, because a
    plan must not stop a run.

    Args:
        completed: the experiment, as JSON has it.
        path: of the file.
    """
    experiment = Experiment.model_validate_json(json.dumps(completed))
    try:
        card = quiet_card(experiment.device)
        plan = Planner(experiment, card, partial(config_to_plan, experiment, {})).plan()
    except Exception as error:  # any
        log.exception("there is no plan")
        plan = {"experiment": experiment.name, "device": None, "jobs": [], "problem": f"{type(error).__name__}: {error}"}
    else:
        log.info("%s", format_plan(plan))
    Path(path).write_text(json.dumps(plan, indent=2), encoding="utf-8")


def quiet_card(device: Device) -> Card:
    """The device of this machine, without a measurement on a GPU, which other jobs may be using."""
    if device == "cpu" or not torch.cuda.is_available():
        return present_card(device)
    name, memory = torch.cuda.get_device_name(), total_memory("cuda")
    try:
        return replace(card_named(name), memory=memory)
    except ValueError:  # not in the table: its times are unknown
        return Card(name, memory, dtype_name(compute_dtype(torch.device("cuda"))), matmul_rate=None, bandwidth=None)
