"""What trainings need on a device: their memory, the activations that they keep, and what would make them fit."""

import gc
import json
from collections.abc import Callable
from typing import Any

from longqlora.config.settings import Device, RopeExtension, TrainingSettings
from longqlora.modeling.rope import context_in, scaling_problems
from longqlora.planning.changes import Change, cheapest_change
from longqlora.planning.peak_memory import Memory, longest_context, training_memory
from longqlora.training.activations import Form, choose_form, forms_on

WITHOUT_MEMORY = (
    "steps", "epochs", "gradient_accumulation", "alpha", "loraplus_ratio", "learning_rate", "warmup_steps", "max_grad_norm",
    "weight_decay", "full_attention_share",
)  # fmt: skip
"""Settings that the memory does not depend on."""
TRACED_CONTEXT = 2**15
"""Tokens up to which the search for the longest context traces; a trace takes the longer, the more tiles there are. Beyond, the
memory grows linearly with the context."""


class TracedOnce:
    """Calls functions once for equal arguments, and keeps results and errors: a hub that does not answer is asked once."""

    def __init__(self):
        self.results: dict[str, Any] = {}

    def __call__(self, function: Callable, *arguments: Any, **options: Any) -> Any:
        key = json.dumps([function.__name__, arguments, options], default=lambda value: value.model_dump(), sort_keys=True)
        if key not in self.results:
            try:
                self.results[key] = function(*arguments, **options)
            except Exception as error:
                self.results[key] = error
            if len(self.results) == 1:  # all modules are imported: the garbage collections of the next traces skip them
                gc.collect()
                gc.freeze()
        if isinstance(self.results[key], Exception):
            raise self.results[key]
        return self.results[key]


class TrainingPlans:
    """Plans trainings of a model.

    Args:
        model: its ``config.json``.
        device: where it is trained.
        compute: dtype that the device computes in.
        budget: bytes that the device has for a process; None: unknown.
        traced: keeps the traces.
    """

    def __init__(self, model: dict, device: Device, compute: str, budget: int | None, traced: TracedOnce):
        self.model, self.device, self.compute, self.budget, self.traced = model, device, compute, budget, traced

    def memory(self, settings: TrainingSettings, extension: RopeExtension, form: Form | None = None) -> Memory:
        """Peak memory of a training that keeps the activations of a form; by default those that it chooses."""
        form = form or self.form(settings, extension)
        return self.traced(
            training_memory, self.model, self.linear_equivalent(extension), traced_as(settings), self.device, self.compute, form
        )

    def linear_equivalent(self, extension: RopeExtension) -> RopeExtension:
        """The linear extension to the same context, because all scalings need the same memory; that of a model which is scaled
        already stays."""
        linear = RopeExtension(target_context=extension.target_context)
        return extension if any(scaling_problems(self.model, linear)) else linear

    def form(self, settings: TrainingSettings, extension: RopeExtension) -> Form:
        """The activations that a training keeps; on a GPU of unknown memory as few as without offloading them."""
        if self.budget is None and settings.memory == "auto":
            return "layer_inputs"
        return choose_form(settings, self.device, lambda form: self.memory(settings, extension, form).peak, self.budget or 0)

    def smallest(self, settings: TrainingSettings, extension: RopeExtension) -> int:
        """The smallest peak that the settings allow: with ``memory: auto``, a training that does not fit otherwise keeps as few
        activations as possible. A context below the model's own cannot be trained, and is taken for that."""
        own = context_in(self.model) or 0
        extension = extension.model_copy(update={"target_context": max(extension.target_context, own)})
        form = forms_on(self.device)[-1] if settings.memory == "auto" else self.form(settings, extension)
        return self.memory(settings, extension, form).peak

    def change(self, settings: TrainingSettings, extension: RopeExtension) -> Change | None:
        """The cheapest change with which a training fits; None if there is none, or nothing is known about the device."""
        if self.budget is None:
            return None
        return cheapest_change(settings, extension, self.smallest, self.budget, has_gpu=self.device == "cuda")

    def longest_context(self, settings: TrainingSettings, extension: RopeExtension) -> int | None:
        """The longest target context that a training fits with, in tokens; None if nothing is known about the device, or the
        memory depends on the windows of PoSE instead."""
        if self.budget is None or settings.pose_window:
            return None

        def traced(length: int) -> int:
            return self.smallest(settings, extension.model_copy(update={"target_context": length, "factor": None}))

        def peak_at(length: int) -> int:
            if length <= TRACED_CONTEXT:
                return traced(length)
            half, whole = traced(TRACED_CONTEXT // 2), traced(TRACED_CONTEXT)
            return round(whole + (whole - half) * (length / TRACED_CONTEXT - 1) * 2)

        return longest_context(self.budget, peak_at)


def traced_as(settings: TrainingSettings) -> TrainingSettings:
    """The settings that the memory depends on, with the defaults of the others."""
    defaults = {name: TrainingSettings.model_fields[name].default for name in WITHOUT_MEMORY}
    return settings.model_copy(update=defaults)
