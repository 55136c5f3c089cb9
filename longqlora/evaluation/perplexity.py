"""Perplexity of a system on an evaluation set at a context length, under a protocol of :mod:`longqlora.evaluation.protocols`.

Several processes share the batches out and send their sums to the first; a batch is the same for any number of them, and so
is every sum, bit for bit.
"""

import logging
import math
import os
from contextlib import contextmanager

import numpy
import pandas
import torch
import torch.distributed as distributed
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from longqlora.data.token_descriptions import read_description
from longqlora.data.token_files import check_vocabulary, read_tokens
from longqlora.evaluation.evaluated_model import EvaluatedModel
from longqlora.evaluation.protocols import Window, make_windows
from longqlora.evaluation.statistics import mean_nll
from longqlora.jobs.memory import memory_explained
from longqlora.modeling.devices import find_device
from longqlora.modeling.rope import context_of, rope_of

log = logging.getLogger(__name__)

TOKENS_PER_BATCH = 8192  # of one forward pass, so that short windows fill the hardware as well as long ones
POSITIONS_PER_CHUNK = 1024  # whose logits exist at once, in float32
BINS_PER_OCTAVE = 4  # of the loss by position


class NonFiniteLogits(ValueError):
    """A model that predicts something that is not a number."""


@torch.inference_mode()
def nll_of_batch(model, tokens: torch.Tensor, skipped: int = 0) -> torch.Tensor:
    """Negative log-likelihood of each token given those before it, the logits of a part of them at a time.

    Args:
        model: a causal language model of transformers.
        tokens: ``[b, n + 1]``, the inputs and, one to the right, the targets; filled up at the right where a row is shorter,
            which causality hides from every real token.
        skipped: how many targets at the left are not wanted.

    Returns:
        ``[b, n - skipped]``, float32, in nats.
    """
    hidden = model.base_model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state[:, skipped:]  # [b, s, width]
    head, losses = model.get_output_embeddings(), []
    positions = max(1, POSITIONS_PER_CHUNK // len(tokens))
    for states, targets in zip(hidden.split(positions, 1), tokens[:, 1 + skipped :].split(positions, 1), strict=True):
        logits = head(states).float()  # [b, positions, vocabulary]
        losses.append(cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets))
    return torch.cat(losses, dim=1)


def batches_of(windows: list[Window]) -> list[list[int]]:
    """Indices of windows of like length that go through the model together, the longest first: what is going to exhaust the
    memory does so at once."""
    order = sorted(range(len(windows)), key=lambda index: windows[index].begin - windows[index].end)
    batches = []
    for index in order:
        longest = windows[batches[-1][0]] if batches else None
        if longest is None or (len(batches[-1]) + 1) * (longest.end - longest.begin - 1) > TOKENS_PER_BATCH:
            batches.append([])
        batches[-1].append(index)
    return batches


def position_edges(window: int) -> numpy.ndarray:
    """Bins of the number of tokens before a scored one, 1 … ``window``, equally wide on a logarithmic axis: the first number of
    each bin and, at the end, ``window + 1``."""
    starts = numpy.round(2 ** (numpy.arange(BINS_PER_OCTAVE * math.log2(window) + 1) / BINS_PER_OCTAVE)).astype(int)
    return numpy.append(numpy.unique(starts[starts < max(2, window)]), window + 1)  # none is of the last token alone


def score_batch(model, tokens: numpy.ndarray, windows: list[Window], edges: numpy.ndarray) -> tuple[list[float], numpy.ndarray]:
    """Score windows in one forward pass.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokens: ``[num_tokens]``, the stream that the windows lie in.
        windows: the longest first.
        edges: of :func:`position_edges`.

    Returns:
        Summed negative log-likelihood (nats) of each window; and of each bin, with how many tokens, ``[2, bins]``.
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


def score(model, tokens: numpy.ndarray, windows: list[Window]) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Score the windows of an evaluation set, in this process or, where ``torch.distributed`` is initialised, in all of them.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokens: ``[num_tokens]``
        windows: of :func:`longqlora.evaluation.protocols.make_windows`.

    Returns:
        By window: document, begin, num_scored, nll (summed, in nats). By position: tokens_before (the first of a bin),
        num_scored, nll.

    Raises:
        NonFiniteLogits: if a loss is not a number; the message names the window.
    """
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    batches = batches_of(windows)
    edges = position_edges(max(window.end - window.begin - 1 for window in windows))
    results = {}
    for number in tqdm(range(rank, len(batches), world), unit="batch", disable=None):
        results[number] = score_batch(model, tokens, [windows[index] for index in batches[number]], edges)
    if world > 1:
        gathered = [None] * world
        distributed.all_gather_object(gathered, results)
        results = {number: result for part in gathered for number, result in part.items()}
    by_window = pandas.DataFrame(windows, columns=Window._fields)
    by_window["num_scored"] = by_window["end"] - by_window["first"]
    sums, bins = numpy.zeros(len(windows)), numpy.zeros((2, len(edges) - 1))
    for number, batch in enumerate(batches):  # in this order, so that the sums round alike for any number of processes
        sums[batch] = results[number][0]
        bins += results[number][1]
    if not numpy.isfinite(sums).all():
        index = int(numpy.argmin(numpy.isfinite(sums)))
        where = f"window {index} of {len(windows)}, tokens {windows[index].begin} to {windows[index].end - 1}"
        raise NonFiniteLogits(f"{where}: the loss is not a number (NaN or infinite logits)")
    by_position = pandas.DataFrame({"tokens_before": edges[:-1], "num_scored": bins[1].astype(int), "nll": bins[0]})
    by_window = by_window.assign(nll=sums)[["document", "begin", "num_scored", "nll"]]
    return by_window, by_position[by_position["num_scored"] > 0]


@contextmanager
def process_group():
    """Initialise ``torch.distributed`` where torchrun started this process among others."""
    if "RANK" not in os.environ:
        yield
        return
    distributed.init_process_group("gloo")  # sums alone are exchanged, also where each process has a GPU
    try:
        yield
    finally:
        distributed.destroy_process_group()


def evaluate_perplexity(
    *,
    system: str,
    dataset: str,
    model: dict,
    tokens_path: str,
    protocol: str,
    window: int,
    stride: int,
    device: str,
    windows_path: str,
) -> dict:
    """Score a system on an evaluation set; write what each window lost, and return the protocol and the result.

    Args:
        system, dataset: their names, for messages.
        model: fields of :class:`longqlora.evaluation.evaluated_model.EvaluatedModel`.
        tokens_path: ``.bin`` file, its description beside it.
        protocol, window, stride: see :func:`longqlora.evaluation.protocols.make_windows`.
        device: ``cpu`` or ``cuda``.
        windows_path: Parquet file to write, a row a window (document, begin, num_scored, nll).

    Raises:
        ValueError: if the evaluation set was made with another tokenizer, or is empty; if the model cannot take the window.
        NonFiniteLogits: naming system, set and window.
    """
    evaluated = EvaluatedModel(**model)
    config = evaluated.config()
    is_within_context, context = evaluated.check_window(window), context_of(config)
    check_vocabulary(tokens_path, config.vocab_size)
    description = read_description(tokens_path)
    windows = make_windows(protocol, description["document_ends"], window, stride)
    if not is_within_context:
        log.warning("%s: %d tokens are beyond its context of %d, with no scaling of positions", system, window, context)
    with process_group(), memory_explained(*evaluated.memory_advice(window)):
        loaded = evaluated.load(find_device(device), window)
        try:
            by_window, by_position = score(loaded, read_tokens(tokens_path), windows)
        except NonFiniteLogits as error:
            raise NonFiniteLogits(f"{system} on {dataset} at {window} tokens: {error}") from None
    if os.environ.get("RANK", "0") == "0":
        by_window.to_parquet(windows_path, index=False)
    stamp = {"protocol": protocol, "window": window, "stride": stride}
    return {
        **stamp,
        "precision": evaluated.precision,
        "attention": evaluated.attention,
        "weights": "adapter on the base" if evaluated.adapter else "model",
        "model": evaluated.path,
        "model_context": context,
        **rope_of(config),
        "is_within_context": is_within_context,
        "num_tokens": description["document_ends"][-1],
        "num_documents": len(description["document_ends"]),
        "dataset_warning": description.get("warning"),
        **summarise(by_window, stamp),
        "loss_by_position": by_position.to_dict("list"),
    }


def summarise(by_window: pandas.DataFrame, protocol: dict) -> dict:
    """What the windows of an evaluation come to.

    Args:
        by_window: of :func:`score`.
        protocol: its protocol, window and stride.
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
