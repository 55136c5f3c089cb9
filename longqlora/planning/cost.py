"""How long jobs take, estimated from the model's ``config.json`` and the settings alone: what the device has to do
(:mod:`longqlora.planning.work`) at the rates of a card (:mod:`longqlora.planning.cards`).

Only an H100 was measured: on every other card the time is extrapolated, and on a CPU it is that of cores that no other job
uses.
"""

import math
from dataclasses import dataclass
from typing import Any

from longqlora.config.settings import Attention, Precision, RetrievalSettings, RopeExtension, TrainingSettings
from longqlora.evaluation.retrieval_tasks import NUM_CANDIDATES, NUM_NEEDLES, SLACK_TOKENS
from longqlora.planning.cards import Card
from longqlora.planning.work import ITEMSIZE, Shape, Work, forward_pass, micro_step, shape_of, stored_bytes, trained_weights

START_SECONDS = 4.2  # imports, and the model's own modules (RESULTS.md, "Where the time of the demo goes")
DISK_RATE = 1e9  # bytes per second at which weights are read and written: an assumption, a fast disk
OPTIMIZER_TRAFFIC = 40  # bytes that a step of AdamW and the clipping of gradients move, by trained weight
ANSWERED_DIGITS = 7  # of a number that retrieval asks for; its tokens, if each digit is one

# Constants of modules that import torch, which a plan must do without; a test compares them.
TOKENS_PER_BATCH = 8192  # longqlora.evaluation.token_losses
CACHE_SHARE, CACHE_BYTES = 0.25, 2**30  # longqlora.evaluation.retrieval
HELD_OUT_TOKENS = 16384  # longqlora.data.packing


@dataclass(frozen=True)
class TrainingTime:
    """How long a training takes, in seconds.

    Attributes:
        step: one optimizer step; with shifted sparse attention that ends in full attention, the mean.
        run: the whole job, with loading; None if the number of steps is unknown.
    """

    step: float
    run: float | None


def training_seconds(
    model: dict,
    extension: RopeExtension,
    settings: TrainingSettings,
    card: Card,
    *,
    form: str = "layer_inputs",
    num_windows: int | None = None,
) -> TrainingTime | None:
    """How long a training takes. All windows count as full, and as one document. Not counted: the exchange between several
    processes, DeepSpeed, offloaded state, and DoRA's norms.

    Args:
        model: the base model's ``config.json``.
        extension: how its context is extended.
        settings: of the training.
        card: that each of its processes runs on.
        form: which activations are kept: ``all``, ``linear_outputs`` (those of the base's linear layers), ``layer_inputs`` or
            ``offloaded`` (the same in CPU memory, copied while the GPU computes).
        num_windows: of the data, for a training of a number of epochs.

    Returns:
        None if the card's rates are unknown.

    Raises:
        ValueError: if the file lacks a size of the model.
    """
    if card.matmul_rate is None:
        return None
    shape, tokens = shape_of(model), settings.pose_window or extension.target_context
    full = micro_step(shape, tokens, tokens, settings, card, form)
    sparse, end = full, settings.full_attention_share
    if settings.attention == "shifted_sparse":
        sparse = micro_step(shape, tokens, math.ceil(tokens * settings.group_ratio), settings, card, form)
    update = Work(traffic=trained_weights(shape, settings) * OPTIMIZER_TRAFFIC)
    step = ((sparse * (1 - end) + full * end) * settings.gradient_accumulation + update).seconds(card)
    steps = settings.steps
    if steps is None and settings.epochs and num_windows:
        groups = settings.num_processes * settings.num_nodes // settings.sequence_parallel  # each has its own windows
        per_step = settings.batch_size * settings.gradient_accumulation * groups
        steps = math.ceil(settings.epochs * math.ceil(num_windows / per_step))
    return TrainingTime(step, None if steps is None else steps * step + loading_seconds(shape))


def loading_seconds(shape: Shape) -> float:
    """How long a job takes to start and to load a model."""
    return START_SECONDS + stored_bytes(shape) / DISK_RATE


def evaluation_seconds(
    model: dict,
    window: int,
    num_windows: float,
    precision: Precision,
    card: Card,
    *,
    adapter: TrainingSettings | None = None,
    attention: Attention = "full",
    group_ratio: float = 0.25,
) -> float | None:
    """How long a perplexity cell takes, with loading.

    Args:
        model: the evaluated model's ``config.json``.
        window: tokens that it reads at once.
        num_windows: windows of all evaluation sets; with a stride below the window, there are more of them.
        precision: of the weights.
        card: that it runs on.
        adapter: settings of the adapter's training, if an adapter is put on the model without merging.
        attention, group_ratio: in evaluation.

    Returns:
        Seconds; None if the card's rates are unknown.

    Raises:
        ValueError: if the file lacks a size of the model.
    """
    if card.matmul_rate is None:
        return None
    shape = shape_of(model)
    rows = max(1, TOKENS_PER_BATCH // window)
    group = math.ceil(window * group_ratio) if attention == "shifted_sparse" else None
    batch = forward_pass(shape, window, loaded_in(precision, card), card, rows=rows, group=group, adapter=adapter)
    return loading_seconds(shape) + num_windows / rows * batch.seconds(card)


def loaded_in(precision: Precision, card: Card) -> str:
    """The precision of weights that are loaded as ``auto`` on a card, or another precision itself."""
    return card.compute if precision == "auto" else precision


def retrieval_seconds(
    model: dict,
    length: int,
    settings: RetrievalSettings,
    precision: Precision,
    card: Card,
    *,
    adapter: TrainingSettings | None = None,
) -> float | None:
    """How long a retrieval cell takes, with loading: prompts and answers of all tasks and depths. Answers count as long as they
    may be, so a model that ends its answers takes less.

    Args:
        model, precision, card, adapter: see :func:`evaluation_seconds`.
        length: tokens of a prompt and its answer.
        settings: tasks, depths and samples.

    Returns:
        Seconds; None if the card's rates are unknown.

    Raises:
        ValueError: if the file lacks a size of the model.
    """
    if card.matmul_rate is None:
        return None
    shape, weights = shape_of(model), loaded_in(precision, card)
    options: dict[str, Any] = {"adapter": adapter}
    at_once = min(settings.samples, prompts_at_once(shape, length, weights, card))
    batches = len(settings.depths) * math.ceil(settings.samples / at_once)
    read = forward_pass(shape, length, weights, card, rows=at_once, scored=1, **options).seconds(card)
    write = forward_pass(shape, 1, weights, card, rows=at_once, before=length, **options).seconds(card)
    seconds = loading_seconds(shape)
    for task in settings.tasks:
        if task == "induction":
            rows = min(NUM_CANDIDATES, max(1, TOKENS_PER_BATCH // length))
            text = forward_pass(shape, length, weights, card, rows=rows, scored=1, **options).seconds(card)
            seconds += len(settings.depths) * settings.samples * math.ceil(NUM_CANDIDATES / rows) * text
        else:
            answers = NUM_NEEDLES if task == "multi_value" else 1
            seconds += batches * (read + answers * (SLACK_TOKENS + ANSWERED_DIGITS) * write)
    return seconds


def prompts_at_once(shape: Shape, length: int, precision: str, card: Card) -> int:
    """Prompts that a model continues at once: as many as the cache of keys and values has memory for, as
    :func:`longqlora.evaluation.retrieval.prompts_per_batch` decides."""
    held = shape.num_parameters * {"nf4": 0.53, "int8": 1}.get(precision, ITEMSIZE.get(precision, 2))
    memory = CACHE_BYTES if card.memory is None else CACHE_SHARE * (card.memory - held)
    return max(1, int(memory // (length * 2 * shape.layers * shape.keys * ITEMSIZE[card.compute])))


def merging_seconds(model: dict, extension: RopeExtension, settings: TrainingSettings, card: Card) -> float | None:
    """How long it takes to merge an adapter in each way, and to compare the merges on held-out text.

    Args:
        model, extension, settings, card: of the adapter's training, see :func:`training_seconds`.

    Returns:
        Seconds; None if the card's rates are unknown.

    Raises:
        ValueError: if the file lacks a size of the model.
    """
    if card.matmul_rate is None:
        return None
    shape, merges = shape_of(model), 2 if settings.method == "qlora" else 1
    tokens = extension.target_context
    windows = math.ceil(max(HELD_OUT_TOKENS, tokens) / tokens)
    precision = "bfloat16" if card.device == "cpu" and shape.stored != "float32" else card.compute
    trained = "nf4" if settings.method == "qlora" else precision
    adapted = forward_pass(shape, tokens, trained, card, adapter=settings).seconds(card)
    other = forward_pass(shape, tokens, precision, card).seconds(card)
    transfers = 2 * merges + merges + 2  # a merge reads and writes all weights; then each compared model is loaded
    moving = transfers * stored_bytes(shape) / DISK_RATE
    return START_SECONDS + moving + windows * (adapted + (merges + 1) * other)
