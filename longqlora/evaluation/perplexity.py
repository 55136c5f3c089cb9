"""Perplexity of a system at one context length, by a protocol of :mod:`longqlora.evaluation.protocols`.

Several processes may share the batches. Which windows form a batch does not depend on the number of processes, so the results
do not either, bit for bit.
"""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import pandas
import torch
import torch.distributed as distributed
from tqdm import tqdm

from longqlora.config.settings import Device, EvaluatedModel, Protocol
from longqlora.data.token_descriptions import read_description
from longqlora.data.token_files import check_vocabulary, read_tokens
from longqlora.evaluation.evaluated_model import at_commit, is_within_context, load_evaluated_model, memory_advice
from longqlora.evaluation.protocols import Window, make_windows
from longqlora.evaluation.statistics import mean_nll
from longqlora.evaluation.token_losses import NonFiniteLogits, batches_of, nll_of_batch
from longqlora.jobs.memory import memory_explained
from longqlora.modeling.loading import load_config
from longqlora.modeling.rope import context_of, rope_of

log = logging.getLogger(__name__)

BINS_PER_OCTAVE = 4  # bins of the loss by position, per doubling of the position


def position_edges(window: int) -> numpy.ndarray:
    """Bin edges for the number of tokens before a scored token (1 … ``window``), equally spaced on a logarithmic axis: the
    first number of each bin, and ``window + 1`` at the end."""
    starts = numpy.round(2 ** (numpy.arange(BINS_PER_OCTAVE * math.log2(window) + 1) / BINS_PER_OCTAVE)).astype(int)
    return numpy.append(numpy.unique(starts[starts < max(2, window)]), window + 1)  # no bin for the last position alone


def score_batch(model, tokens: numpy.ndarray, windows: list[Window], edges: numpy.ndarray) -> tuple[list[float], numpy.ndarray]:
    """Score windows in one forward pass.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokens: ``[num_tokens]``, the whole token stream.
        windows: windows of the stream, the longest first.
        edges: see :func:`position_edges`.

    Returns:
        The summed negative log-likelihood (nats) of each window; and, ``[2, bins]``, that of each position bin and its number
        of scored tokens.
    """
    width = windows[0].end - windows[0].begin
    batch = numpy.zeros((len(windows), width), dtype="int64")
    is_scored = numpy.zeros((len(windows), width - 1), dtype=bool)
    for row, (_, begin, first, end) in enumerate(windows):
        batch[row, : end - begin] = tokens[begin:end]
        is_scored[row, first - begin - 1 : end - begin - 1] = True
    skipped = int(is_scored.any(axis=0).argmax())
    device = model.get_input_embeddings().weight.device
    losses = numpy.zeros(is_scored.shape)
    losses[:, skipped:] = nll_of_batch(model, torch.from_numpy(batch).to(device), skipped).cpu().numpy()
    losses[~is_scored] = 0
    inside = edges[:-1][edges[:-1] < width] - 1
    bins = numpy.zeros((2, len(edges) - 1))
    bins[:, : len(inside)] = [numpy.add.reduceat(part.sum(axis=0), inside) for part in (losses, is_scored)]
    return losses.sum(axis=1).tolist(), bins


def score_windows(model, tokens: numpy.ndarray, windows: list[Window]) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Score the windows of an evaluation set, in this process or, if ``torch.distributed`` is initialized, in all of them.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokens: ``[num_tokens]``, the whole token stream.
        windows: see :func:`longqlora.evaluation.protocols.make_windows`.

    Returns:
        One row per window: document, begin, num_scored, nll (summed, in nats). One row per position bin: tokens_before (the
        smallest of the bin), num_scored, nll.

    Raises:
        NonFiniteLogits: if a loss is not a number; the message names the window.
    """
    lengths = [window.num_read for window in windows]
    batches, edges = batches_of(lengths), position_edges(max(lengths))
    results = score_batches(model, tokens, [[windows[index] for index in batch] for batch in batches], edges)
    sums, bins = numpy.zeros(len(windows)), numpy.zeros((2, len(edges) - 1))
    for batch, (window_sums, bin_sums) in zip(batches, results, strict=True):
        sums[batch] = window_sums
        bins += bin_sums
    if not numpy.isfinite(sums).all():
        index = int(numpy.argmin(numpy.isfinite(sums)))
        window = windows[index]
        raise NonFiniteLogits(
            f"window {index} of {len(windows)}, tokens {window.begin} to {window.end - 1}: "
            "the loss is not a number (NaN or infinite logits)"
        )
    by_window = pandas.DataFrame(windows, columns=Window._fields)
    by_window = by_window.assign(num_scored=by_window["end"] - by_window["first"], nll=sums)
    by_position = pandas.DataFrame({"tokens_before": edges[:-1], "num_scored": bins[1].astype(int), "nll": bins[0]})
    return by_window[["document", "begin", "num_scored", "nll"]], by_position[by_position["num_scored"] > 0]


def score_batches(
    model, tokens: numpy.ndarray, batches: list[list[Window]], edges: numpy.ndarray
) -> list[tuple[list[float], numpy.ndarray]]:
    """Results of :func:`score_batch` in the order of the batches, which the processes share; each process gets all of them.

    The order of the results is that of the batches, so sums over them round alike for any number of processes.
    """
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    own = {}
    for number in tqdm(range(rank, len(batches), world), unit="batch", disable=None):
        own[number] = score_batch(model, tokens, batches[number], edges)
    parts: list = [own]
    if world > 1:
        parts = [None] * world
        distributed.all_gather_object(parts, own)
    results = {number: result for part in parts for number, result in part.items()}
    return [results[number] for number in range(len(batches))]


@contextmanager
def process_group() -> Iterator[None]:
    """Initialize ``torch.distributed`` if torchrun started this process as one of several."""
    if "RANK" not in os.environ:
        yield
        return
    distributed.init_process_group("gloo")  # exchanges only sums, so that CPU communication is enough on GPUs too
    try:
        yield
    finally:
        distributed.destroy_process_group()


def evaluate_perplexity(
    *,
    system: str,
    model: EvaluatedModel,
    tokens: dict[str, str],
    protocol: Protocol,
    device: Device,
    windows: dict[str, str],
) -> dict[str, dict]:
    """Measure one system at one context length, and write the losses of its windows for paired comparisons.

    Args:
        system: name for messages.
        model: the model of the system.
        tokens: token stream of each evaluation set, with its description, see :mod:`longqlora.data.token_files`.
        protocol: how perplexity is measured.
        device: ``cpu`` or ``cuda``.
        windows: Parquet file to write for each evaluation set: one row per window, with document, begin, num_scored and nll
            (summed, in nats).

    Returns:
        The result for each evaluation set: protocol, model and its context, mean_nll (nats), standard_error, perplexity, loss
        by position.

    Raises:
        ValueError: if an evaluation set is empty or was made with another tokenizer, or the model cannot read the window.
        NonFiniteLogits: if a loss is not a number; the message names system, set and window.
    """
    model = at_commit(model)
    vocab_size = load_config(model.path, model.extension).vocab_size
    for path in tokens.values():
        check_vocabulary(path, vocab_size, model.path)
    measurement = describe_measurement(model, protocol)
    scored = {dataset: make_windows(read_description(path)["document_ends"], protocol) for dataset, path in tokens.items()}
    if not measurement["is_within_context"]:
        message = "%s: %d tokens are beyond the model's context of %d tokens"
        log.warning(message, system, protocol.window, measurement["model_context"])
    results = {}
    with process_group(), memory_explained(*memory_advice(model, protocol.window)):
        loaded = load_evaluated_model(model, device, protocol.window)
        for dataset, path in tokens.items():
            try:
                results[dataset] = measurement | score_set(loaded, path, scored[dataset], protocol, windows[dataset])
            except NonFiniteLogits as error:
                raise NonFiniteLogits(f"{system} on {dataset} at {protocol.window} tokens: {error}") from None
    return results


def score_set(model, path: str, windows: list[Window], protocol: Protocol, windows_path: str) -> dict:
    """Score one evaluation set with a loaded model; see :func:`evaluate_perplexity`.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        path: token stream with its description.
        windows: of the stream.
        protocol: how perplexity is measured.
        windows_path: Parquet file to write.
    """
    description = read_description(path)
    by_window, by_position = score_windows(model, read_tokens(path), windows)
    if os.environ.get("RANK", "0") == "0":
        by_window.to_parquet(windows_path, index=False)
    return {
        "num_tokens": description["document_ends"][-1],
        "num_documents": len(description["document_ends"]),
        "dataset_warning": description.get("warning"),
        **summarize(by_window, protocol),
        "loss_by_position": by_position.to_dict("list"),
    }


def describe_measurement(model: EvaluatedModel, protocol: Protocol) -> dict:
    """The protocol and the model, as they are recorded with a result.

    Raises:
        ValueError: if the model cannot read the window.
    """
    config = load_config(model.path, model.extension)
    return {
        "protocol": protocol.name,
        "window": protocol.window,
        "stride": protocol.stride,
        "precision": model.precision,
        "attention": model.attention,
        "weights": "adapter on the base" if model.adapter else "model",
        "model": model.path,
        "model_context": context_of(config),
        **rope_of(config),
        "is_within_context": is_within_context(model, protocol.window),
    }


def summarize(by_window: pandas.DataFrame, protocol: Protocol) -> dict:
    """Mean loss and perplexity over the windows of an evaluation.

    Args:
        by_window: see :func:`score_windows`.
        protocol: how perplexity was measured.
    """
    mean, units = mean_nll(by_window, protocol)
    return {
        "num_windows": len(by_window),
        "num_scored": int(by_window["num_scored"].sum()),
        "mean_nll": mean.mean,
        "standard_error": mean.standard_error,
        "standard_error_units": units,
        "perplexity": math.exp(mean.mean),
    }
