"""Peak memory of a job, by part, from the model's ``config.json`` alone: no weights, no GPU, some seconds.

Each job's own functions run on fake tensors (:mod:`longqlora.planning.traced_jobs`), on a model of few layers, from which the
memory of all layers follows: every part grows linearly with the number of layers.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, cast

from longqlora.config.settings import Attention, Device, Precision, RetrievalTask, RopeExtension, TrainingSettings

if TYPE_CHECKING:
    from longqlora.planning.traced_jobs import Traced
    from longqlora.training.activations import Form

MIB, GIB = 2**20, 2**30
# All of these are measured, see benchmarks/RESULTS.md
PROCESS = {"training": 720 * MIB, "evaluation": 495 * MIB, "retrieval": 440 * MIB, "merging": 530 * MIB}
"""Memory of a job's process without what is traced, with torch's build for CPUs."""
ARROW = 190 * MIB
"""What reading held-out records from an Arrow file takes more."""
CUDA_PROCESS = 400 * MIB
"""What a process takes more with torch's build for CUDA, without what the GPU's driver maps, which was not measured."""
CUDA_CONTEXT = 790 * MIB
"""GPU memory of a process outside of torch's allocator: CUDA's context, and kernels of torch, cuBLAS and bitsandbytes."""
WORKSPACES = 64 * MIB
"""Of kernels, which torch's allocator gives out and no trace sees, such as those of cuBLAS."""
FRAGMENTATION = 0.055
"""What torch's allocator reserves in addition, as a share of what it has given out."""
LONGEST_CONTEXT = 2**22
"""Tokens at which the search for the longest context ends."""


@dataclass(frozen=True)
class Memory:
    """Peak memory of a job, in bytes.

    Attributes:
        parts: what the device holds at the peak, by part: weights, quantization constants, adapter, gradients, optimizer, layer
            inputs (saved by the forward pass), recomputation (of one layer, in the backward pass), forward pass, cache (of keys
            and values), loss, allowance. On a GPU, its memory; on a CPU, the memory of the process.
        at_peak: the operation at which the peak is reached, in words.
        host: memory of the process on the machine; on a CPU equal to ``peak``.
    """

    parts: dict[str, int]
    at_peak: str
    host: int

    @property
    def peak(self) -> int:
        """Bytes of the device at the peak: the sum of the parts."""
        return sum(self.parts.values())


def training_memory(
    model: dict, extension: RopeExtension, settings: TrainingSettings, device: Device, compute: str, form: "Form"
) -> Memory:
    """Peak memory of a process of a training. With ZeRO, the buffers of DeepSpeed are not counted.

    Args:
        model: the base model's ``config.json``.
        extension: how its context is extended.
        settings: of the training.
        device: ``cuda`` or ``cpu``.
        compute: dtype that the device computes in: ``bfloat16``, ``float16`` (V100) or ``float32``; on a CPU ``float32``.
        form: which activations are kept, see :mod:`longqlora.training.activations`.
    """
    import torch

    from longqlora.planning.traced_jobs import TrainingStep, composed, trace_step

    if extension.scaling == "dynamic":  # takes the same memory, and looks at positions, which fake tensors do not have
        extension = extension.model_copy(update={"scaling": "linear"})
    dtype = getattr(torch, compute)
    traced = composed(
        model, lambda few_layers: trace_step(TrainingStep(few_layers, extension, settings, device == "cuda", dtype, form))
    )
    for peak in traced.peaks.values():
        peak.parts = of_one_process(peak.parts, settings)
    return summarized(traced, device, "training")


def of_one_process(parts: Counter, settings: TrainingSettings) -> Counter:
    """What each of several processes holds: ZeRO shards gradients and optimizer state, its stage 3 the weights too, and on
    request keeps the optimizer state on the host."""
    sharded = {0: (), 2: ("gradients", "optimizer"), 3: ("gradients", "optimizer", "weights", "quantization constants")}
    processes = settings.num_processes * settings.num_nodes
    sizes = {part: -(-size // processes) for part, size in parts.items() if part in sharded[settings.zero_stage]}
    if settings.zero_stage and settings.offload:
        sizes["optimizer"] = 0
    return Counter(parts | sizes)


def summarized(traced: "Traced", device: Device, job: str) -> Memory:
    """The peak of all phases, with the allowance for what a trace does not see.

    Args:
        traced: a job.
        device: ``cuda`` or ``cpu``.
        job: of :data:`PROCESS`.
    """
    phase, peak = max(traced.peaks.items(), key=lambda item: item[1].parts.total())
    allowance = PROCESS[job]
    if device == "cuda":
        allowance = CUDA_CONTEXT + WORKSPACES + round(FRAGMENTATION * peak.parts.total())
    parts = {part: size for part, size in peak.parts.items() if size} | {"allowance": allowance}
    host = PROCESS[job] + CUDA_PROCESS + traced.host if device == "cuda" else sum(parts.values())
    return Memory(parts, f"{phase}, {peak.operation}", host)


def evaluation_memory(
    model: dict,
    window: int,
    precision: Precision,
    device: Device,
    compute: str,
    *,
    adapter: TrainingSettings | None = None,
    attention: Attention = "full",
) -> Memory:
    """Peak memory of a perplexity cell.

    Args:
        model: the evaluated model's ``config.json``.
        window: tokens that it reads at once.
        precision: of its weights.
        device, compute: see :func:`training_memory`.
        adapter: settings of the adapter's training, if an adapter is put on the model without merging.
        attention: in evaluation.
    """
    from longqlora.evaluation.token_losses import TOKENS_PER_BATCH, nll_of_batch

    rows = max(1, TOKENS_PER_BATCH // window)
    return reading_memory(
        model,
        lambda built, ids: nll_of_batch(built, ids(rows, window + 1)),
        precision, device, compute, adapter=adapter, attention=attention, job="evaluation",
    )  # fmt: skip


def retrieval_memory(
    model: dict,
    length: int,
    precision: Precision,
    device: Device,
    compute: str,
    *,
    adapter: TrainingSettings | None = None,
    attention: Attention = "full",
    device_memory: int | None = None,
    tasks: Sequence[RetrievalTask] = ("passkey",),
    samples: int = 10,
) -> Memory:
    """Peak memory of a retrieval cell: a batch of prompts, and the cache of their keys and values.

    Args:
        model, precision, device, compute, adapter, attention: see :func:`evaluation_memory`.
        length: tokens of a prompt and its answer.
        device_memory: bytes of the GPU, a share of whose free memory the cache takes; None: one prompt at a time.
        tasks, samples: see :class:`longqlora.config.settings.RetrievalSection`.
    """
    from longqlora.evaluation.retrieval import CACHE_BYTES, CACHE_SHARE, TOKENS_PER_BATCH
    from longqlora.evaluation.retrieval_tasks import NUM_CANDIDATES
    from longqlora.evaluation.token_losses import nll_of_batch

    measure = partial(
        reading_memory, model, precision=precision, device=device, compute=compute, adapter=adapter, attention=attention,
        job="retrieval",
    )  # fmt: skip

    def prompts(rows: int) -> Memory:
        return measure(lambda built, ids: built(input_ids=ids(rows, length), use_cache=attention == "full", logits_to_keep=1))

    if set(tasks) == {"induction"}:
        rows = min(NUM_CANDIDATES, max(1, TOKENS_PER_BATCH // length))
        return measure(lambda built, ids: nll_of_batch(built, ids(rows, length)))
    single = prompts(1)
    memory: float = CACHE_BYTES
    if device == "cuda":
        held = ("weights", "quantization constants", "adapter", "allowance")
        memory = CACHE_SHARE * ((device_memory or 0) - sum(single.parts.get(part, 0) for part in held))
    rows = min(samples, int(memory // single.parts.get("cache", memory + 1)))
    return prompts(rows) if rows > 1 else single


def merging_memory(
    model: dict,
    extension: RopeExtension,
    settings: TrainingSettings,
    device: Device,
    compute: str,
    *,
    device_memory: int | None = None,
) -> Memory:
    """Peak memory of merging an adapter and comparing the merges.

    The comparison decides it on the device: one model after the other reads windows of held-out text. On the host, merging
    holds a shard of the merged model.

    Args:
        model, extension, settings, device, compute: of the adapter's training, see :func:`training_memory`.
        device_memory: bytes of the GPU, which decide the precision of the comparison; None: they are enough for 16 bit.
    """
    from longqlora.planning.fake_models import number_of_parameters, stored_bytes
    from longqlora.publishing.merge_report import measure, precision_that_fits
    from longqlora.publishing.weights import MAX_SHARD_BYTES

    number, size = number_of_parameters(model), stored_bytes(model)
    precision: Precision = "float32" if size == 4 else "bfloat16"  # as the merge report chooses it
    if device == "cuda":
        precision = precision_that_fits(number, (device_memory or 2**50) - CUDA_CONTEXT, cast(Precision, compute))
    trained: Precision = "nf4" if settings.method == "qlora" else precision

    def compared(precision: Precision, adapter: TrainingSettings | None) -> Memory:
        def read(built, ids):
            measure(built, [{"input_ids": ids(1, extension.target_context)[0], "labels": ids(1, extension.target_context)[0]}])

        return reading_memory(model, read, precision, device, compute, adapter=adapter, job="merging")

    largest = max(compared(trained, settings), compared(precision, None), key=lambda memory: memory.peak)
    host = max(largest.host, PROCESS["merging"] + min(number * size, MAX_SHARD_BYTES))
    host += ARROW if settings.data == "sft" else 0
    if device == "cuda":
        return replace(largest, host=host)
    parts = largest.parts | {"allowance": largest.parts["allowance"] + host - largest.host}
    return Memory(parts, largest.at_peak, host)


def reading_memory(
    model: dict,
    read: Callable,
    precision: Precision,
    device: Device,
    compute: str,
    *,
    adapter: TrainingSettings | None = None,
    attention: Attention = "full",
    job: str,
) -> Memory:
    """Peak memory of a job in which a model reads text in evaluation mode.

    Args:
        model, precision, device, compute, adapter, attention: see :func:`evaluation_memory`.
        read: takes the model, and a function that makes token ids ``[rows, tokens]`` from both numbers.
        job: of :data:`PROCESS`.
    """
    import torch

    from longqlora.planning.traced_jobs import composed, trace_reading

    dtype = getattr(torch, compute)
    trace = partial(
        trace_reading, read=read, precision=precision, on_gpu=device == "cuda", compute_dtype=dtype, adapter=adapter,
        is_sparse=attention == "shifted_sparse",
    )  # fmt: skip
    return summarized(composed(model, trace), device, job)


def longest_context(budget: int, peak_at: Callable[[int], int], step: int = 1024) -> int:
    """The longest context that fits into a budget, by bisection.

    Args:
        budget: bytes.
        peak_at: from a context in tokens to bytes; must not fall with the context.
        step: the context is a multiple of it.

    Returns:
        Tokens; 0 if not even ``step`` tokens fit.
    """
    fits, too_long = 0, LONGEST_CONTEXT // step
    peaks: dict[int, int] = {}
    while too_long - fits > 1:
        # peaks grow nearly linearly with the context, so a line through two of them soon leads to the border
        middle = (fits + too_long) // 2
        if len(peaks) < 2:
            middle = min(middle, 8 * 2 ** len(peaks))
        else:
            (first, low), (second, high) = sorted(peaks.items(), key=lambda item: abs(item[1] - budget))[:2]
            if high != low:
                middle = round(first + (budget - low) * (second - first) / (high - low) - 0.5)
        middle = min(max(middle, fits + 1), too_long - 1)
        peaks[middle] = peak_at(middle * step)
        if peaks[middle] <= budget:
            fits = middle
        else:
            too_long = middle
    return fits * step
