"""Which activations a training keeps for its backward pass: the more, the faster and the larger.

| form | kept until the backward pass | computed again there |
|:--|:--|:--|
| ``all`` | every activation | nothing |
| ``linear_outputs`` | the inputs of the layers, the outputs of the base's linear layers and of the attention | the rest |
| ``layer_inputs`` | the inputs of the layers | every layer, long windows with MLPs in tiles |
| ``offloaded`` | the same, in CPU memory (:mod:`longqlora.training.offloading`) | the same |

All forms have the same losses and gradients, but for rounding, and for what dropout drops in tiles.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

from transformers import PreTrainedModel

from longqlora.config.settings import Device, TrainingSettings
from longqlora.modeling.norms import use_fused_norms
from longqlora.modeling.recomputation import Blocks, keep_and_reuse, mark_linear_layers, recompute_all
from longqlora.modeling.tiled_mlp import tile_mlps
from longqlora.training.offloading import offload_inputs

Form = Literal["all", "linear_outputs", "layer_inputs", "offloaded"]


def forms_on(device: Device) -> tuple[Form, ...]:
    """The forms that a device has, from the fastest and largest to the slowest and smallest; on a CPU there is nothing to
    offload to."""
    forms = get_args(Form)
    return forms if device == "cuda" else forms[:-1]


def choose_form(settings: TrainingSettings, device: Device, peak_of: Callable[[Form], int], budget: int) -> Form:
    """The form that ``training.memory`` asks for.

    Args:
        settings: of the training.
        device: where it runs.
        peak_of: estimates the peak memory of a process of the training in a form, in bytes; called only for ``memory: auto``,
            and not with ZeRO, whose sharded state it does not know.
        budget: memory of a process, in bytes: all that the device has (:func:`longqlora.jobs.memory.total_memory`) and not
            what is free, so that a training which resumes chooses the same form.

    Returns:
        For ``auto`` the fastest form whose peak is within the budget, the smallest one if none is, and with ZeRO
        ``layer_inputs``.
    """
    forms = forms_on(device)
    if settings.memory == "speed":
        return forms[0]
    if settings.memory == "smallest":
        return forms[-1]
    if settings.zero_stage:
        return "layer_inputs"
    return next((form for form in forms if peak_of(form) <= budget), forms[-1])


def keep_activations(model: PreTrainedModel, form: Form, *, tiles: bool = True) -> None:
    """Let a model keep the activations of a form in training.

    Args:
        model: of transformers, with its adapter if it has one.
        form: see the table of this module.
        tiles: whether the MLPs of long windows are computed in tiles where layers are computed again
            (:mod:`longqlora.modeling.tiled_mlp`). Not with ZeRO-3, where a weight has no elements between its uses.
    """
    if form != "all":
        checkpoint_layers(model, form, tiles=tiles)
    use_fused_norms(model)


def checkpoint_layers(model: PreTrainedModel, form: Form, *, tiles: bool) -> None:
    """Let the layers of a model be computed again in the backward pass; see :func:`keep_activations`."""
    if form == "linear_outputs":
        mark_linear_layers(model)
    elif tiles:
        tile_mlps(model)
    if form == "offloaded":
        offload_inputs(model)
    contexts = partial(keep_and_reuse, Blocks()) if form == "linear_outputs" else recompute_all
    options: dict[str, Any] = {"use_reentrant": False, "context_fn": contexts}
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    model.disable_input_require_grads()  # only reentrant checkpointing needs gradients of the embeddings' output
