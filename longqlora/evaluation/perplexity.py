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
from longqlora.evaluation.statistics import mean_nll, on_key_tokens
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


def losses_of_windows(model, tokens: numpy.ndarray, windows: list[Window]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Negative log-likelihood (nats) of each token of some windows, in one forward pass.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokens: ``[num_tokens]``, the whole token stream.
        windows: windows of the stream, the longest first.

    Returns:
        The losses, ``[windows, longest window]``, of the token after the window's first one and so on, 0 where nothing is
        scored; and, in the same shape, whether the token is scored.
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
    return losses, is_scored


def score_batch(
    model, tokens: numpy.ndarray, windows: list[Window], edges: numpy.ndarray, is_key: numpy.ndarray
) -> tuple[list[float], list[float], numpy.ndarray]:
    """Score windows in one forward pass.

    Args:
        model, tokens, windows: see :func:`losses_of_windows`.
        edges: see :func:`position_edges`.
        is_key: ``[num_tokens]``, which tokens are key tokens.

    Returns:
        The summed negative log-likelihood (nats) of each window; that of its key tokens; and, ``[2, bins]``, that of each
        position bin and its number of scored tokens.
    """
    losses, is_scored = losses_of_windows(model, tokens, windows)
    width = losses.shape[1] + 1
    inside = edges[:-1][edges[:-1] < width] - 1
    bins = numpy.zeros((2, len(edges) - 1))
    bins[:, : len(inside)] = [numpy.add.reduceat(part.sum(axis=0), inside) for part in (losses, is_scored)]
    key_sums = [
        float(losses[row, first - begin - 1 : end - begin - 1][is_key[first:end]].sum())
        for row, (_, begin, first, end) in enumerate(windows)
    ]
    return losses.sum(axis=1).tolist(), key_sums, bins


def score_windows(
    model, tokens: numpy.ndarray, windows: list[Window], key_tokens: numpy.ndarray | None = None
) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Score the windows of an evaluation set, in this process or, if ``torch.distributed`` is initialized, in all of them.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokens: ``[num_tokens]``, the whole token stream.
        windows: see :func:`longqlora.evaluation.protocols.make_windows`.
        key_tokens: positions of the key tokens in the stream, if they are scored too.

    Returns:
        One row per window: document, begin, num_scored, nll (summed, in nats), and with key tokens their number in the window,
        num_key_tokens, and their key_nll. One row per position bin: tokens_before (the smallest of the bin), num_scored, nll.

    Raises:
        NonFiniteLogits: if a loss is not a number; the message names the window.
    """
    lengths = [window.num_read for window in windows]
    batches, edges = batches_of(lengths), position_edges(max(lengths))
    is_key = numpy.zeros(len(tokens), dtype=bool)
    is_key[[] if key_tokens is None else key_tokens] = True
    results = score_batches(model, tokens, [[windows[index] for index in batch] for batch in batches], edges, is_key)
    sums, key_sums, bins = numpy.zeros(len(windows)), numpy.zeros(len(windows)), numpy.zeros((2, len(edges) - 1))
    for batch, (window_sums, window_key_sums, bin_sums) in zip(batches, results, strict=True):
        sums[batch] = window_sums
        key_sums[batch] = window_key_sums
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
    columns = ["document", "begin", "num_scored", "nll"]
    if key_tokens is not None:
        num_key_tokens = [int(is_key[window.first : window.end].sum()) for window in windows]
        by_window = by_window.assign(num_key_tokens=num_key_tokens, key_nll=key_sums)
        columns += ["num_key_tokens", "key_nll"]
    by_position = pandas.DataFrame({"tokens_before": edges[:-1], "num_scored": bins[1].astype(int), "nll": bins[0]})
    return by_window[columns], by_position[by_position["num_scored"] > 0]


def score_batches(
    model, tokens: numpy.ndarray, batches: list[list[Window]], edges: numpy.ndarray, is_key: numpy.ndarray
) -> list[tuple[list[float], list[float], numpy.ndarray]]:
    """Results of :func:`score_batch` in the order of the batches, which the processes share; each process gets all of them.

    The order of the results is that of the batches, so sums over them round alike for any number of processes.
    """
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    own = {}
    for number in tqdm(range(rank, len(batches), world), unit="batch", disable=None):
        own[number] = score_batch(model, tokens, batches[number], edges, is_key)
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
    key_tokens: dict[str, str] | None = None,
) -> dict[str, dict]:
    """Measure one system at one context length, and write the losses of its windows for paired comparisons.

    Args:
        system: name for messages.
        model: the model of the system.
        tokens: token stream of each evaluation set, with its description, see :mod:`longqlora.data.token_files`.
        protocol: how perplexity is measured.
        device: ``cpu`` or ``cuda``.
        windows: Parquet file to write for each evaluation set: one row per window, with document, begin, num_scored and nll
            (summed, in nats), and with key tokens num_key_tokens and key_nll.
        key_tokens: file of :mod:`longqlora.evaluation.key_tokens` for each evaluation set, if LongPPL is measured.

    Returns:
        The result for each evaluation set: protocol, model and its context, mean_nll (nats), standard_error, perplexity, loss
        by position, and with key tokens what :func:`summarize_key_tokens` returns.

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
                files = (path, windows[dataset], (key_tokens or {}).get(dataset))
                results[dataset] = measurement | score_set(loaded, scored[dataset], protocol, *files)
            except NonFiniteLogits as error:
                raise NonFiniteLogits(f"{system} on {dataset} at {protocol.window} tokens: {error}") from None
    return results


def score_set(
    model, windows: list[Window], protocol: Protocol, path: str, windows_path: str, key_tokens_path: str | None
) -> dict:
    """Score one evaluation set with a loaded model; see :func:`evaluate_perplexity`.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        windows: of the stream.
        protocol: how perplexity is measured.
        path: token stream with its description.
        windows_path: Parquet file to write.
        key_tokens_path: Parquet file with the positions of the key tokens; None: LongPPL is not measured.
    """
    description = read_description(path)
    key_tokens = pandas.read_parquet(key_tokens_path)["position"].to_numpy() if key_tokens_path else None
    by_window, by_position = score_windows(model, read_tokens(path), windows, key_tokens)
    if os.environ.get("RANK", "0") == "0":
        by_window.to_parquet(windows_path, index=False)
    return {
        "num_tokens": description["document_ends"][-1],
        "num_documents": len(description["document_ends"]),
        "dataset_warning": description.get("warning"),
        **summarize(by_window, protocol),
        **({} if key_tokens is None else summarize_key_tokens(by_window, protocol)),
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


def summarize_key_tokens(by_window: pandas.DataFrame, protocol: Protocol) -> dict:
    """LongPPL: the perplexity of the key tokens (arXiv 2410.23771), with the standard error of their mean loss.

    Args:
        by_window: see :func:`score_windows`.
        protocol: how perplexity was measured.

    Returns:
        num_key_tokens, key_mean_nll (nats), key_standard_error, longppl; None where there are no key tokens.
    """
    num_key_tokens = int(by_window["num_key_tokens"].sum())
    if not num_key_tokens:
        return {"num_key_tokens": 0, "key_mean_nll": None, "key_standard_error": None, "longppl": None}
    mean, _ = mean_nll(on_key_tokens(by_window), protocol)
    return {
        "num_key_tokens": num_key_tokens,
        "key_mean_nll": mean.mean,
        "key_standard_error": mean.standard_error,
        "longppl": math.exp(mean.mean),
    }
