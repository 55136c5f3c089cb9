"""``rope_scaling: best``: which scalings are compared, and how the chosen one replaces ``best``.

Imports nothing heavy, because the workflow checks local models whenever it starts.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from longqlora.config.settings import EvaluatedModel, RopeExtension, RopeScaling
from longqlora.modeling.rope import context_in, scaling_problems

COMPARED: tuple[RopeScaling, ...] = ("linear", "ntk", "yarn", "llama3")
"""The scalings that are the same at every length and follow from the target. With ``dynamic``, a training at the target length
would not fit shorter texts, which are scaled less; ``theta`` needs a value."""


def candidates(model: dict, target_context: int) -> list[RopeExtension]:
    """The extensions that are compared for a model: of one that is scaled already, only its own scaling.

    Args:
        model: its ``config.json``.
        target_context: in tokens.
    """
    extensions = [RopeExtension(scaling=scaling, target_context=target_context) for scaling in COMPARED]
    return [extension for extension in extensions if not any(scaling_problems(model, extension))]


def choice_problems(model: dict, target_context: int) -> Iterator[str]:
    """Yield why no scaling can be chosen for a model; see :func:`candidates`."""
    if target_context == context_in(model):
        yield f"target_context {target_context} is the model's own context: rope_scaling: best has nothing to choose from"
    elif not candidates(model, target_context):
        yield from scaling_problems(model, RopeExtension(scaling=COMPARED[0], target_context=target_context))


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
