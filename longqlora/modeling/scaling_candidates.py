"""``rope_scaling: best``: which scalings are compared.

Apart from :mod:`longqlora.modeling.scaling_choice`, which every training and evaluation imports, so that another candidate runs
only the choice again. Imports nothing heavy, because the workflow checks local models whenever it starts.
"""

from collections.abc import Iterator

from longqlora.config.settings import RopeExtension, RopeScaling
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
