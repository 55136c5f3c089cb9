"""Grids of settings as ordinary systems: each cell is one, and what two cells share is trained and evaluated once."""

import json
from itertools import product

from longqlora.config.completed import System
from longqlora.config.settings import Ablation, AblationSection

TRAINING_AXES = ("rank", "steps")  # settings of the training; the others are the system's own


def with_changes(system: System, changes: dict) -> System:
    """A system with other settings; an adapter is evaluated on the base, so that nothing has to be merged."""
    assert system.training is not None
    training = {axis: value for axis, value in changes.items() if axis in TRAINING_AXES}
    if "steps" in training:
        training["epochs"] = None
    own = {axis: value for axis, value in changes.items() if axis not in TRAINING_AXES}
    if own.get("rope_scaling") not in (None, "theta"):
        own["rope_theta"] = None  # only theta has one: with ntk, it would replace the computed one
    merged = system.training.method == "full"
    return system.model_copy(update={**own, "training": system.training.model_copy(update=training), "merged": merged})


def fingerprint(system: System, keys: tuple[str, ...]) -> str:
    """Some settings of a system, equal for two systems that agree in them."""
    return json.dumps(system.model_dump(include=set(keys)), sort_keys=True)


def training_of(system: System) -> str:
    """The settings that decide a system's weights."""
    return fingerprint(system, ("model", "target_context", "rope_scaling", "rope_factor", "rope_theta", "training", "seed"))


def evaluation_of(system: System) -> str:
    """The settings that decide a system's figures, given its weights."""
    return fingerprint(system, ("merged", "precision", "evaluation_attention"))


def add_ablations(
    systems: dict[str, System], ablations: dict[str, AblationSection]
) -> tuple[dict[str, System], dict[str, Ablation]]:
    """Add the cells of all grids to the systems, unless a system is that cell already.

    Args:
        systems: by name.
        ablations: by name.

    Returns:
        The systems with the cells among them, and the ablations, by name.
    """
    systems, complete = dict(systems), {}
    for name, ablation in ablations.items():
        grid = ablation.grid.model_dump(exclude_none=True)
        varied, rows = systems.get(ablation.system), {}
        if varied is not None and varied.training is not None:  # otherwise it is reported with the other mistakes
            for values in product(*grid.values()):
                changes = dict(zip(grid, values, strict=True))
                rows[find_or_add_cell(systems, ablation.system, changes)] = changes
        complete[name] = Ablation(label=ablation.label or name, axes=list(grid), rows=rows)
    return systems, complete


def find_or_add_cell(systems: dict[str, System], varied: str, changes: dict) -> str:
    """Name of the system that is this cell, added if there is none."""
    system = with_changes(systems[varied], changes)
    owners = [name for name, other in systems.items() if training_of(other) == training_of(system)]
    for name, other in systems.items():
        if (other.weights_of or name) in owners and evaluation_of(other) == evaluation_of(system):
            return name
    name = ".".join([varied, *(f"{axis}-{value}" for axis, value in changes.items())]).replace("_", "-")
    while name in systems:  # a row that happens to have this name, with other settings
        name += ".cell"
    if owners:
        system = system.model_copy(update={"training": None, "progress": None, "weights_of": owners[0]})
    systems[name] = system.model_copy(update={"label": name})
    return name
