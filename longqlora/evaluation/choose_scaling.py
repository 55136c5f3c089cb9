"""The choice of ``rope_scaling: best``: the scaling with which the untrained base has the lowest loss on the training data.

Nothing was trained on these data yet, so they need not be held out; evaluation sets decide nothing.
"""

import gc
import logging
import math

import numpy
import torch

from longqlora.config.settings import Device, Precision, RopeExtension
from longqlora.data.hub import pinned_model
from longqlora.data.packing import PackedWindows, UnpackedRecords, count_tokens, largest_id, read_tokenized_records
from longqlora.data.token_files import IGNORED, check_token, read_tokens
from longqlora.evaluation.statistics import Estimate, ratio_estimate
from longqlora.evaluation.token_losses import NonFiniteLogits, nll_of_batch
from longqlora.jobs.memory import memory_explained
from longqlora.modeling.compatibility import extension_problems
from longqlora.modeling.devices import find_device, keep_freed_memory
from longqlora.modeling.loading import load_config, load_model
from longqlora.modeling.scaling_candidates import candidates, choice_problems

log = logging.getLogger(__name__)

MIN_WINDOWS = 4  # of the target context
MIN_TOKENS = 16384


def choose_scaling(*, base_model: str, data: str, target_context: int, precision: Precision, device: Device) -> dict:
    """Choose the RoPE scaling with which a model reaches a target context best without training.

    Args:
        base_model: directory or hub id.
        data: training data: ``.bin`` file of token ids, or the Arrow file of a tokenized instruction set.
        target_context: in tokens.
        precision: of the weights.
        device: ``cpu`` or ``cuda``.

    Returns:
        The record: ``chosen``, what it was chosen for and on, and by scaling mean_nll (nats), standard_error (over windows;
        None for one window) and perplexity. It has no time or digest, so that an equal choice reruns nothing.

    Raises:
        ValueError: if the model cannot be extended to the target, or the data hold token ids that it does not have.
        NonFiniteLogits: if a loss is not a number; the message names the scaling.
    """
    base_model = pinned_model(base_model)
    config = load_config(base_model)
    model = config.to_dict()
    if problems := [*extension_problems(model, target_context), *choice_problems(model, target_context)]:
        raise ValueError("\n".join(f"{base_model}: {problem}" for problem in problems))
    check_token(data, largest_id(data), config.vocab_size, base_model)
    windows = last_windows(data, target_context)
    what = f"reading {target_context} tokens at once with {base_model} in precision {precision}"
    measured = {}
    with memory_explained(what, "Choose a shorter target_context, or name a scaling instead of best (rope_scaling)."):
        for extension in candidates(model, target_context):
            measured[extension.scaling] = mean_loss(base_model, extension, windows, precision, device)
            log.info("%s: a loss of %.4f nats", extension.scaling, measured[extension.scaling].mean)
    return {
        "chosen": min(measured, key=lambda scaling: measured[scaling].mean),
        "base_model": base_model,
        "target_context": target_context,
        "precision": precision,
        "data": data,
        "windows": len(windows),
        "tokens": sum(len(window["input_ids"]) for window in windows),
        "scalings": {
            scaling: {"mean_nll": loss.mean, "standard_error": loss.standard_error, "perplexity": math.exp(loss.mean)}
            for scaling, loss in measured.items()
        },
    }


def last_windows(path: str, length: int) -> list[dict[str, torch.Tensor]]:
    """The end of the training data: :data:`MIN_WINDOWS` windows, but at least :data:`MIN_TOKENS` tokens, or all there are.

    Args:
        path: ``.bin`` file, which is cut into windows, or Arrow file of an instruction set, whose records are the windows.
        length: of a window, in tokens.
    """
    wanted = max(MIN_TOKENS, MIN_WINDOWS * length)
    data: PackedWindows | UnpackedRecords
    if path.endswith(".bin"):
        data = PackedWindows(path, length, begin=max(0, len(read_tokens(path)) - wanted))
    else:
        from_end = count_tokens(read_tokenized_records(path))[::-1].cumsum()  # tokens of the last record, the last two, …
        data = UnpackedRecords(path, begin=max(0, len(from_end) - int(from_end.searchsorted(wanted)) - 1))
    return [data[index] for index in range(len(data))]


def mean_loss(
    base_model: str, extension: RopeExtension, windows: list[dict[str, torch.Tensor]], precision: Precision, device: Device
) -> Estimate:
    """Mean loss (nats) of an untrained model whose context is extended, on the tokens that have a label, and its standard error
    over windows.

    Args:
        base_model, precision, device: see :func:`choose_scaling`.
        extension: how the context is extended.
        windows: see :func:`last_windows`.
    """
    torch_device = find_device(device)
    keep_freed_memory(torch_device)
    model = load_model(base_model, device=torch_device, precision=precision, extension=extension).eval()
    sums, counts = numpy.zeros(len(windows)), numpy.zeros(len(windows))
    for index, window in enumerate(windows):
        losses = nll_of_batch(model, window["input_ids"][None].to(torch_device))[0].double().cpu()  # [n - 1]
        is_scored = window["labels"][1:] != IGNORED
        sums[index], counts[index] = losses[is_scored].sum(), is_scored.sum()
    del model
    gc.collect()  # quantized layers of bitsandbytes are in reference cycles
    if torch_device.type == "cuda":
        torch.cuda.empty_cache()
    estimate = ratio_estimate(sums, counts)
    if not math.isfinite(estimate.mean):
        raise NonFiniteLogits(
            f"{base_model} with rope_scaling {extension.scaling}: the loss is not a number on the training data"
        )
    return estimate
