"""The memory of a training, estimated before its weights are loaded: which activations it keeps, and whether it fits at all."""

import logging

import torch

from longqlora.config.settings import Device, RopeExtension, TrainingSettings
from longqlora.jobs.memory import total_memory
from longqlora.modeling.devices import compute_dtype, dtype_name
from longqlora.modeling.loading import load_config
from longqlora.planning.peak_memory import Memory
from longqlora.planning.training_plans import TracedOnce, TrainingPlans
from longqlora.training.activations import Form, choose_form

log = logging.getLogger(__name__)

GIB = 2**30
ACTIVATIONS_PER_LAYER = 30  # widths of a layer that a token keeps without checkpointing; LLaMA has about 20 in float32
BYTES_PER_WEIGHT = 20  # float32 weight, gradient, two states of Adam, and a copy
SMALL = 0.25  # of the device's memory


def prepare_memory(
    base_model: str, extension: RopeExtension, settings: TrainingSettings, device: Device, *, check: bool
) -> Form:
    """Choose the activations that a training keeps for its backward pass, and refuse a training that does not fit.

    A training that is far smaller than the device is not traced, and neither is one with ZeRO, whose sharded state the trace
    does not know.

    Args:
        base_model: directory or hub id.
        extension: how its context is extended.
        settings: of the training.
        device: where it runs.
        check: refuse.

    Raises:
        ValueError: if the training does not fit into the memory of the device; the message names the cheapest change.
    """
    model, budget = load_config(base_model).to_dict(), total_memory(device)
    if device == "cpu":
        budget //= settings.num_processes  # a GPU belongs to one process
    if settings.zero_stage or upper_bound(model, extension, settings) < SMALL * budget:
        return choose_form(settings, device, lambda form: 0, budget)
    plans = TrainingPlans(model, device, dtype_name(compute_dtype(torch.device(device))), budget, TracedOnce())
    try:
        form = plans.form(settings, extension)
        needed = plans.memory(settings, extension, form)
    except Exception as error:  # any, from the code of an unusual model, which may train all the same
        log.warning("the memory of this training could not be estimated (%s: %s)", type(error).__name__, error)
        return "layer_inputs" if settings.memory == "auto" else choose_form(settings, device, lambda form: 0, budget)
    log.info("planned peak of memory: %.2f of %.2f GiB (%s)", needed.peak / GIB, budget / GIB, in_words(needed))
    if check and needed.peak - needed.parts.get("allowance", 0) > budget:
        raise ValueError(refusal(needed, budget, device, str(plans.change(settings, extension) or "")))
    return form


def refusal(needed: Memory, budget: int, device: Device, change: str) -> str:
    """Why a training does not start, and what would let it."""
    owner = "the GPU" if device == "cuda" else "this machine"
    advice = f"It fits with {change}" if change else "No change of its settings that was tried makes it fit"
    return (
        f"the training needs {needed.peak / GIB:.1f} GiB of memory ({in_words(needed)}), and {owner} has {budget / GIB:.1f}. "
        f"{advice}; training.check_memory: false starts it all the same"
    )


def in_words(memory: Memory) -> str:
    """The parts of a peak in GiB, the largest first."""
    parts = sorted(memory.parts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts if size >= GIB / 20)


def upper_bound(model: dict, extension: RopeExtension, settings: TrainingSettings) -> float:
    """A rough upper bound on the peak of memory in bytes; infinite for a model that does not say its shape.

    Args:
        model: its ``config.json``.
        extension, settings: of the training.
    """
    try:
        width, inner = model["hidden_size"], model["intermediate_size"]
        layers, vocabulary = model["num_hidden_layers"], model["vocab_size"]
    except KeyError:
        return float("inf")
    weights = layers * (4 * width * width + 3 * width * inner) + 2 * vocabulary * width
    tokens = settings.batch_size * (settings.pose_window or extension.target_context)
    return BYTES_PER_WEIGHT * weights + 4 * tokens * layers * ACTIVATIONS_PER_LAYER * max(width, inner // 2)
