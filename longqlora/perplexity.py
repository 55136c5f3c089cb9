"""Perplexity of a stream of tokens at a context length: each token scored once, the mean weighted by tokens."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from longqlora.models import context_of, find_device, load_config, load_model
from longqlora.tokens import check_vocabulary, read_tokens

TOKENS_PER_BATCH = 8192  # of one forward pass, so that short windows fill the hardware as well as long ones
POSITIONS_PER_CHUNK = 1024  # whose logits exist at once, in float32


@dataclass(frozen=True)
class Perplexity:
    """Summed negative log-likelihoods (nats) of the windows of one evaluation.

    Attributes:
        num_tokens: length of the stream.
        nll_sums: ``[windows]``, summed over the scored tokens of each window.
        num_scored: ``[windows]``, how many tokens that are.
    """

    num_tokens: int
    nll_sums: numpy.ndarray
    num_scored: numpy.ndarray

    @property
    def mean_nll(self) -> float:
        """Mean over tokens, in nats."""
        return float(self.nll_sums.sum() / self.num_scored.sum())

    @property
    def standard_error(self) -> float:
        """Of ``mean_nll``, windows being the sampling units (ratio estimator, Cochran 1977, §6.4); 0 for a single one."""
        count = len(self.nll_sums)
        if count < 2:
            return 0.0
        residuals = self.nll_sums - self.mean_nll * self.num_scored
        return float(math.sqrt(count / (count - 1) * (residuals**2).sum()) / self.num_scored.sum())


def rolling_windows(num_tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, end, scored): the model reads tokens [begin, end) and its last ``scored`` predictions count, those of
    the tokens (end - scored, end].

    Every token but the first of the stream is scored exactly once; all windows but the first score ``stride`` tokens with
    ``window - stride`` tokens of context before them.

    Args:
        num_tokens: length of the stream, at least 2.
        window: tokens that the model reads at once.
        stride: tokens that each further window scores, 1 ≤ stride ≤ window.

    Raises:
        ValueError: if the stride is not in that range, or there is no token to score.
    """
    if not 1 <= stride <= window:
        raise ValueError(f"stride {stride} must lie between 1 and the window of {window} tokens")
    if num_tokens < 2:
        raise ValueError(f"{num_tokens} token(s): nothing to score, the first token has no context")
    end = min(window, num_tokens - 1)
    yield 0, end, end
    while end < num_tokens - 1:
        begin, scored = end - (window - stride), min(stride, num_tokens - 1 - end)
        end += scored
        yield begin, end, scored


@torch.inference_mode()
def nll_of_batch(model, tokens: torch.Tensor, scored: int) -> torch.Tensor:
    """Summed negative log-likelihood of the last ``scored`` tokens of each row.

    Args:
        model: a causal language model of transformers.
        tokens: ``[b, n + 1]``, the inputs and, one to the right, the targets.
        scored: how many targets count, from the right.

    Returns:
        ``[b]``, float64.
    """
    hidden = model.base_model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state[:, -scored:]  # [b, s, width]
    targets = tokens[:, -scored:]  # [b, s]
    head, total = model.get_output_embeddings(), torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
    positions = max(1, POSITIONS_PER_CHUNK // len(tokens))
    for states, ids in zip(hidden.split(positions, dim=1), targets.split(positions, dim=1), strict=True):
        logits = head(states).float()  # [b, positions, vocabulary]
        losses = cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")
        total += losses.view_as(ids).sum(dim=1, dtype=torch.float64)
    return total


def score(model, tokens: numpy.ndarray, window: int, stride: int) -> Perplexity:
    """Score a stream of tokens.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokens: ``[num_tokens]``
        window, stride: in tokens, see :func:`rolling_windows`.

    Raises:
        ValueError: if a loss is not a number.
    """
    sums, counts = [], []
    device = model.get_input_embeddings().weight.device
    rows_per_batch = max(1, TOKENS_PER_BATCH // window)
    windows = list(rolling_windows(len(tokens), window, stride))
    with tqdm(total=len(windows), unit="window", disable=None) as bar:
        for (_, scored), same_shape in groupby(windows, key=lambda w: (w[1] - w[0], w[2])):
            same_shape = list(same_shape)
            for first in range(0, len(same_shape), rows_per_batch):
                rows = same_shape[first : first + rows_per_batch]
                batch = numpy.stack([tokens[begin : end + 1] for begin, end, _ in rows]).astype("int64")  # [b, n + 1]
                sums.append(nll_of_batch(model, torch.from_numpy(batch).to(device), scored).cpu().numpy())
                counts.extend([scored] * len(rows))
                bar.update(len(rows))
    nll_sums = numpy.concatenate(sums)
    if not numpy.isfinite(nll_sums).all():
        raise ValueError(f"window {int(numpy.argmin(numpy.isfinite(nll_sums)))} of {len(nll_sums)}: the loss is not a number")
    return Perplexity(len(tokens), nll_sums, numpy.array(counts))


def evaluate_perplexity(
    *,
    model_path: str,
    rope_context: int | None,
    rope_scaling: str,
    tokens_path: str,
    window: int,
    stride: int,
    precision: str,
    device: str,
) -> dict:
    """Load a model, score an evaluation set and return the protocol and the result, ready for JSON.

    Args:
        model_path: directory or hub id.
        rope_context: extend the model's context to this many tokens, untrained; None: as it is.
        rope_scaling: how, see :func:`longqlora.positions.extend_context`.
        tokens_path: ``.bin`` file.
        window, stride: in tokens.
        precision: see :func:`longqlora.models.load_model`.
        device: ``cpu`` or ``cuda``.

    Raises:
        ValueError: if the evaluation set was made with another tokenizer, or is empty; if the model cannot take the window.
    """
    config = load_config(model_path)
    if window > getattr(config, "max_seq_len", window):  # ALiBi models make a bias of so many tokens
        raise ValueError(f"{model_path}: a window of {window} tokens is beyond the {config.max_seq_len} that the model takes")
    check_vocabulary(tokens_path, config.vocab_size)
    where = find_device(device)
    model = load_model(
        model_path, device=where, precision=precision, context_length=rope_context, rope_type=rope_scaling
    ).eval()
    result = score(model, read_tokens(tokens_path), window, stride)
    return {
        "window": window,
        "stride": stride,
        "precision": precision,
        "attention": "full",
        "num_tokens": result.num_tokens,
        "num_scored": int(result.num_scored.sum()),
        "num_unscored": result.num_tokens - int(result.num_scored.sum()),
        "num_windows": len(result.nll_sums),
        "mean_nll": result.mean_nll,
        "standard_error": result.standard_error,
        "perplexity": math.exp(result.mean_nll),
        "model": model_path,
        "model_context": context_of(model.config),
    }
