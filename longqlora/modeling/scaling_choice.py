"""``rope_scaling: best``: how the chosen scaling replaces ``best``."""

import json
from pathlib import Path

from longqlora.config.settings import EvaluatedModel, RopeExtension


def read_choice(path: str) -> dict | None:
    """The record of a choice, see :func:`longqlora.evaluation.choose_scaling.choose_scaling`; None without a path."""
    return json.loads(Path(path).read_text(encoding="utf-8")) if path else None


def as_chosen(extension: RopeExtension, choice: dict | None) -> RopeExtension:
    """An extension with the chosen scaling; without a choice, the extension itself."""
    return extension.model_copy(update={"scaling": choice["chosen"]}) if choice else extension


def model_as_chosen(model: EvaluatedModel, choice: dict | None) -> EvaluatedModel:
    """A model whose context is extended by the chosen scaling; without a choice, the model itself."""
    if choice is None or model.extension is None:
        return model
    return model.model_copy(update={"extension": as_chosen(model.extension, choice)})
