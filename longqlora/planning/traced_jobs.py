"""Traces jobs by their own functions: a step of a training, and a model that reads text, as evaluations and merges let it."""

import gc
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch.nn import Parameter
from transformers import DynamicCache

from longqlora.config.settings import Precision, RopeExtension, TrainingSettings
from longqlora.modeling.attention import register_shifted_sparse_attention
from longqlora.planning.fake_models import config_of, fake_model, with_layers
from longqlora.planning.memory_trace import (
    ACTIVATIONS,
    CACHE,
    FORWARD,
    GRADIENTS,
    LAYER_INPUTS,
    LOSS,
    OPTIMIZER,
    RECOMPUTATION,
    MemoryTrace,
    Peak,
    counted_as,
    fake_tensors,
    label_weights,
    pretend_gpu,
)
from longqlora.training.activations import Form, keep_activations
from longqlora.training.adapters import BaseDtypes, add_adapter, base_dtypes
from longqlora.training.train import make_trainable

PAGED_ELEMENTS, QUANTIZED_ELEMENTS = 100_000, 4096  # of a weight: from these on, bitsandbytes pages or quantizes its state


@dataclass(frozen=True)
class TrainingStep:
    """A micro-step of a training.

    Attributes:
        model: the base's ``config.json``.
        extension, settings: of the training.
        on_gpu: whether the device is a GPU.
        compute_dtype: of the device.
        form: which activations are kept, see :mod:`longqlora.training.activations`.
        dtypes: of a 4-bit base; None: those of :func:`longqlora.training.adapters.base_dtypes`.
    """

    model: dict
    extension: RopeExtension
    settings: TrainingSettings
    on_gpu: bool
    compute_dtype: torch.dtype
    form: Form
    dtypes: BaseDtypes | None = None

    @property
    def window(self) -> int:
        """Tokens of a window, or of one process's part of it."""
        return -(-(self.settings.pose_window or self.extension.target_context) // self.settings.sequence_parallel)


@dataclass(frozen=True)
class Traced:
    """What a job holds: the peak of each phase, at most so many bytes on the host, and the number of trained weights."""

    peaks: dict[str, Peak]
    host: int = 0
    trained: int = 0

    @property
    def largest(self) -> Peak:
        """The peak of all phases."""
        return max(self.peaks.values(), key=lambda peak: peak.total)


def trace_step(step: TrainingStep) -> Traced:
    """Trace a micro-step, with the optimizer's state of the step before; unless it is the only one of an optimizer step, with
    gradients as well.

    Phases: forward pass, loss, backward pass of the last, another and the first layer, optimizer's step.
    """
    gc.collect()  # cycles of a former trace would be freed during this one
    trace, settings = MemoryTrace(), step.settings
    with pretended_device(step), fake_tensors(trace, documents=has_documents(settings)), trace:
        model = build_step(step)
        label_weights(trace, model)
        gc.collect()  # of loading, the largest 16-bit weight
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        kept = ACTIVATIONS if step.form == "all" else LAYER_INPUTS
        watch_phases(trace, model, kept)
        trace.part = OPTIMIZER
        state = optimizer_state(trace, trained, step)
        for weight in trained:
            if settings.gradient_accumulation > 1:
                trace.part = GRADIENTS
                weight.grad = torch.zeros_like(weight)
            weight.register_post_accumulate_grad_hook(lambda weight: trace.move(weight.grad, GRADIENTS))
        trace.enter("forward pass", kept)
        take_micro_step(model, step)
        trace.enter("optimizer's step", OPTIMIZER)
        update_weights(trained, step)
        del state
    trace.peaks.pop("loading")
    return Traced(trace.peaks, trace.host_peak, sum(weight.numel() for weight in trained))


def optimizer_state(trace: MemoryTrace, trained: list[Parameter], step: TrainingStep) -> list[torch.Tensor]:
    """Two moments of each trained weight, as AdamW keeps them; paged state of a GPU is on the host."""
    is_paged = step.on_gpu and step.settings.optimizer.startswith("paged")
    state = []
    for weight in trained:
        num_bytes = 4 * weight.numel()
        if step.settings.optimizer.endswith("8bit") and weight.numel() >= QUANTIZED_ELEMENTS:
            num_bytes = weight.numel() + 4 * (weight.numel() // 256)  # a scale for 256 elements
        if is_paged and weight.numel() >= PAGED_ELEMENTS:
            trace.keep_on_host(2 * num_bytes)
        else:
            state += [torch.empty(num_bytes, dtype=torch.uint8) for _ in range(2)]
    return state


def update_weights(trained: list[Parameter], step: TrainingStep) -> None:
    """Holds what an update needs besides its state: torch's AdamW computes a root for every trained weight, on a GPU for all at
    once; that of bitsandbytes nothing."""
    if step.settings.optimizer == "adamw_torch":
        roots = [torch.empty_like(weight) for weight in trained] if step.on_gpu else [torch.empty_like(max(trained, key=len))]
        del roots


def pretended_device(step: TrainingStep):
    """What lets a CPU take the path of the step's device."""
    return pretend_gpu(step.compute_dtype) if step.on_gpu else nullcontext()


def has_documents(settings: TrainingSettings) -> bool:
    """Whether several documents share a window, and none attends to another."""
    return settings.pack_records if settings.data == "sft" else settings.isolate_documents


def build_step(step: TrainingStep):
    """The model of a step, as the training makes it, ready to train."""

    def load_fake(path, *, device, precision, extension, attn_implementation):
        return fake_model(
            step.model,
            precision=precision,
            compute_dtype=step.compute_dtype,
            extension=extension,
            attn_implementation=attn_implementation,
        )

    with (
        patch("longqlora.training.train.load_model", load_fake),
        patch("longqlora.training.train.base_dtypes", lambda device: dtypes_of(step)),
    ):
        model = make_trainable("", step.extension, step.settings, torch.device("cuda" if step.on_gpu else "cpu"))
    keep_activations(model, step.form, tiles=step.settings.zero_stage != 3)
    return model.train()


def dtypes_of(step: TrainingStep) -> BaseDtypes:
    """The dtypes of a 4-bit base."""
    with patch("longqlora.training.adapters.compute_dtype", lambda device: step.compute_dtype):
        return step.dtypes or base_dtypes(torch.device("cuda" if step.on_gpu else "cpu"))


def watch_phases(trace: MemoryTrace, model, kept: str) -> None:
    """Let a trace enter its phases while the model computes.

    Args:
        kept: part of what the forward pass makes.
    """
    decoder = model.get_decoder()

    def watch_layer(name: str):
        def hook(module, inputs, output) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: trace.enter(f"backward pass of {name} layer", RECOMPUTATION))

        return hook

    decoder.register_forward_pre_hook(lambda module, inputs: trace.enter("forward pass", kept))
    names = ["the first", *["another"] * (len(decoder.layers) - 2), "the last"][-len(decoder.layers) :]
    for name, layer in zip(names, decoder.layers, strict=True):
        layer.register_forward_hook(watch_layer(name))
    decoder.norm.register_forward_pre_hook(lambda module, inputs: trace.enter("loss", LOSS))


def take_micro_step(model, step: TrainingStep) -> None:
    """A forward and a backward pass over a batch."""
    ids = torch.zeros(step.settings.batch_size, step.window, dtype=torch.long)
    positions = {"position_ids": torch.zeros_like(ids)} if has_documents(step.settings) or step.settings.pose_window else {}
    with torch.autocast("cpu", step.compute_dtype) if step.compute_dtype is not torch.float32 else nullcontext():
        loss = model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(1.0), **positions).loss
    loss.backward()


# Evaluation, retrieval and merging


def trace_reading(
    model: dict,
    read: Callable,
    *,
    precision: Precision,
    on_gpu: bool,
    compute_dtype: torch.dtype,
    adapter: TrainingSettings | None = None,
    is_sparse: bool = False,
) -> Traced:
    """Trace a model that reads text in evaluation mode.

    Args:
        model: its ``config.json``.
        read: takes the model, and a function that makes token ids ``[rows, tokens]`` from both numbers.
        precision: of the weights.
        on_gpu, compute_dtype: of the device.
        adapter: settings of an adapter on the model; None: there is none.
        is_sparse: whether its attention is shifted sparse, in groups of a quarter.
    """
    gc.collect()
    trace, attention = MemoryTrace(), register_shifted_sparse_attention(0.25, in_evaluation=True) if is_sparse else None
    with pretend_gpu(compute_dtype) if on_gpu else nullcontext(), fake_tensors(trace), trace:
        built = fake_model(model, precision=precision, compute_dtype=compute_dtype, attn_implementation=attention)
        if adapter:
            add_adapter(built, adapter, base=None)  # in place
        label_weights(trace, built)
        gc.collect()
        decoder = built.get_decoder()
        decoder.register_forward_pre_hook(lambda module, inputs: trace.enter("forward pass", FORWARD))
        decoder.norm.register_forward_hook(lambda module, inputs, output: trace.enter("output layer", LOSS))
        numbers = patch.multiple(torch.Tensor, item=lambda tensor: 0.0, __int__=lambda tensor: 0)  # a fake tensor has none
        trace.enter("forward pass", FORWARD)
        with torch.inference_mode(), counted_as(trace, CACHE, DynamicCache, "update"), numbers:
            read(built.eval(), lambda rows, tokens: torch.zeros(rows, tokens, dtype=torch.long))
    trace.peaks.pop("loading")
    return Traced(trace.peaks)


# From few layers to all


def composed(model: dict, trace: Callable[[dict], Traced]) -> Traced:
    """Trace a model of two layers and one of three, and extend both to all layers, because every part grows by the same number
    of bytes with each layer.

    Args:
        model: its ``config.json``.
        trace: traces a model, given its ``config.json``.
    """
    layers = config_of(model).num_hidden_layers
    if layers <= 3:
        return trace(model)
    two, three = (trace(with_layers(model, number)) for number in (2, 3))

    def extended(of_two: int, of_three: int) -> int:
        return of_two + (layers - 2) * (of_three - of_two)

    peaks = {}
    for phase in two.peaks:
        of_two, of_three = two.peaks[phase].parts, three.peaks[phase].parts
        parts = Counter({part: extended(of_two[part], of_three[part]) for part in of_two | of_three})
        peaks[phase] = Peak(parts, three.peaks[phase].operation)
    return Traced(peaks, extended(two.host, three.host), extended(two.trained, three.trained))
