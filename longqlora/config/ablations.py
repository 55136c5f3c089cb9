"""Grids of settings as ordinary systems: each cell is one, what two cells have in common is trained and evaluated once."""

import json
from itertools import product

AXES = {
    "rank": "LoRA rank",
    "steps": "training steps",
    "rope_scaling": "RoPE scaling",
    "evaluation_attention": "attention at inference",
}
"""What can be varied, and its name in tables and plots."""


def name_of_cell(changes: dict) -> str:
    """Values by axis as tables and plots name them: ``LoRA rank 16, training steps 25``."""
    return ", ".join(f"{AXES[axis]} {value}".replace("_", " ") for axis, value in changes.items())


def with_changes(system: dict, changes: dict) -> dict:
    """A system with other settings; an adapter is evaluated on the base, so that nothing has to be merged."""
    varied = system | {"training": dict(system["training"]), "merged": system["training"]["method"] == "full"}
    for axis, value in changes.items():
        if axis in ("rank", "steps"):
            varied["training"][axis] = value
        else:
            varied[axis] = value
    if "steps" in changes:
        varied["training"].pop("epochs", None)
    varied["label"] = name_of_cell(changes)
    return varied


def fingerprint(system: dict, keys: tuple[str, ...]) -> str:
    """What two systems that are the same agree in."""
    return json.dumps([system.get(key) for key in keys], sort_keys=True)


def training_of(system: dict) -> str:
    """What two systems with the same weights agree in."""
    return fingerprint(system, ("model", "target_context", "rope_scaling", "training"))


def evaluation_of(system: dict) -> str:
    """What two systems with the same weights agree in that give the same figures."""
    return fingerprint(system, ("merged", "precision", "evaluation_attention"))


def add_ablations(systems: dict[str, dict], ablations: dict[str, dict]) -> dict[str, dict]:
    """Add the cells of all grids to the systems, as far as they are not there yet.

    Args:
        systems: by name, complete; they grow by the cells.
        ablations: by name: label, system (that is varied) and grid (values by axis).

    Returns:
        By name: label, axes, and rows, the values of the axes by the name of the system that is this cell.
    """
    complete = {}
    for name, ablation in ablations.items():
        varied, rows = ablation["system"], {}
        if "training" in systems.get(varied, {}):  # else it is reported with the other mistakes
            for values in product(*ablation["grid"].values()):
                changes = dict(zip(ablation["grid"], values, strict=True))
                rows[find_or_add_cell(systems, varied, changes)] = changes
        complete[name] = {"label": name, **ablation, "axes": list(ablation["grid"]), "rows": rows}
    return complete


def find_or_add_cell(systems: dict[str, dict], varied: str, changes: dict) -> str:
    """Name of the system that is this cell, added if there is none."""
    system = with_changes(systems[varied], changes)
    owners = [name for name, other in systems.items() if training_of(other) == training_of(system)]
    for name, other in systems.items():
        if other.get("weights_of", name) in owners and evaluation_of(other) == evaluation_of(system):
            return name
    name = ".".join([varied, *(f"{axis}-{value}" for axis, value in changes.items())]).replace("_", "-")
    while name in systems:  # a row that happens to be called so, with other settings
        name += ".cell"
    if owners:
        del system["training"]
        system["weights_of"] = owners[0]
    systems[name] = system
    return name
