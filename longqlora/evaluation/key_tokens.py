"""The key tokens of LongPPL: those that a long context helps to predict (Fang et al. 2024, arXiv 2410.23771).

One model, the evaluator, chooses them for all systems. With the loss of a token in nats, a token is a key token if

* its long-short difference is above 2: loss after a short context − loss after the long context > :data:`ALPHA`;
* its long-context likelihood is above −2: −(loss after the long context) > :data:`BETA`.

The long context is what precedes the token in its window at the longest evaluated length. The short context is the last K to
1.25 K tokens of it, as in the paper's code (4096 to 5120), so that one forward pass serves K / 4 tokens. A token whose long
context is no longer than its short one is no candidate.

LongPPL is the perplexity of the key tokens: :func:`longqlora.evaluation.perplexity.summarize_key_tokens`.
"""

import logging

import numpy
import pandas
from tqdm import tqdm

from longqlora.config.settings import Device, EvaluatedModel, Protocol
from longqlora.data.token_descriptions import read_description
from longqlora.data.token_files import check_vocabulary, read_tokens
from longqlora.evaluation.evaluated_model import at_commit, is_within_context, load_evaluated_model, memory_advice
from longqlora.evaluation.perplexity import losses_of_windows
from longqlora.evaluation.protocols import Window, make_windows
from longqlora.evaluation.token_losses import NonFiniteLogits, batches_of
from longqlora.jobs.memory import memory_explained
from longqlora.modeling.loading import load_config
from longqlora.modeling.rope import context_of

log = logging.getLogger(__name__)

ALPHA = 2.0  # nats
BETA = -2.0  # nats


def short_windows(document_ends: list[int], short_context: int) -> list[Window]:
    """Windows that score each token of a document but its first once, after ``short_context`` to 1.25 times as many tokens, or
    after all that precede it in the document.

    Args:
        document_ends: index after the last token of each document.
        short_context: in tokens.
    """
    stride = max(1, short_context // 4)
    return make_windows(document_ends, Protocol(name="exact", window=short_context + stride - 1, stride=stride))


def losses_by_token(model, tokens: numpy.ndarray, windows: list[Window]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The loss of each token, and the number of tokens that the model reads before it.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokens: ``[num_tokens]``, the whole token stream.
        windows: of the stream; no two score the same token.

    Returns:
        ``[num_tokens]``, in nats, NaN where a token is not scored; and ``[num_tokens]``.

    Raises:
        NonFiniteLogits: if a loss is not a number.
    """
    losses, contexts = numpy.full(len(tokens), numpy.nan), numpy.zeros(len(tokens), dtype=int)
    for batch in tqdm(batches_of([window.num_read for window in windows]), unit="batch", disable=None):
        chosen = [windows[index] for index in batch]
        for (_, begin, first, end), row in zip(chosen, losses_of_windows(model, tokens, chosen)[0], strict=True):
            losses[first:end] = row[first - begin - 1 : end - begin - 1]
            contexts[first:end] = numpy.arange(first, end) - begin
            if not numpy.isfinite(losses[first:end]).all():
                raise NonFiniteLogits(f"tokens {begin} to {end - 1}: the loss is not a number (NaN or infinite logits)")
    return losses, contexts


def key_tokens_of(
    model, tokens: numpy.ndarray, document_ends: list[int], protocol: Protocol, short_context: int
) -> tuple[pandas.DataFrame, int]:
    """The key tokens of one evaluation set, and the number of candidates.

    Args:
        model: the evaluator.
        tokens: ``[num_tokens]``, the whole token stream.
        document_ends: index after the last token of each document.
        protocol: of the long context; ``exact``.
        short_context: in tokens.

    Returns:
        One row per key token: position in the stream, long_nll and short_nll (nats); and the number of tokens whose long
        context is longer than their short one.
    """
    long_nll, long_contexts = losses_by_token(model, tokens, make_windows(document_ends, protocol))
    short_nll, short_contexts = losses_by_token(model, tokens, short_windows(document_ends, short_context))
    is_candidate = long_contexts > short_contexts
    position = numpy.flatnonzero(is_candidate & (short_nll - long_nll > ALPHA) & (-long_nll > BETA))
    found = pandas.DataFrame({"position": position, "long_nll": long_nll[position], "short_nll": short_nll[position]})
    return found, int(is_candidate.sum())


def find_key_tokens(
    *,
    system: str,
    model: EvaluatedModel,
    tokens: dict[str, str],
    protocol: Protocol,
    short_context: int,
    device: Device,
    outputs: dict[str, str],
) -> None:
    """Write the key tokens of each evaluation set.

    Args:
        system: name of the evaluator for messages.
        model: the evaluator.
        tokens: token stream of each evaluation set, with its description, see :mod:`longqlora.data.token_files`.
        protocol: of the longest evaluated length; ``exact``, which scores each token once.
        short_context: in tokens, below the length.
        device: ``cpu`` or ``cuda``.
        outputs: Parquet file to write for each evaluation set, see :func:`key_tokens_of`.

    Raises:
        ValueError: if an evaluation set was made with another tokenizer, or the long context is beyond the model's.
        NonFiniteLogits: if a loss is not a number.
    """
    model = at_commit(model)
    config = load_config(model.path, model.extension)
    if not is_within_context(model, protocol.window):
        raise ValueError(
            f"evaluation.key_tokens.system: {system} has a context of {context_of(config)} tokens, less than the longest of "
            f"evaluation.lengths, {protocol.window}; name a system with a longer context"
        )
    for path in tokens.values():
        check_vocabulary(path, config.vocab_size, model.path)
    with memory_explained(*memory_advice(model, protocol.window)):
        loaded = load_evaluated_model(model, device, protocol.window)
        for dataset, path in tokens.items():
            ends = read_description(path)["document_ends"]
            found, num_candidates = key_tokens_of(loaded, read_tokens(path), ends, protocol, short_context)
            found.to_parquet(outputs[dataset], index=False)
            log.info("%s: %d of %d tokens with a long context are key tokens", dataset, len(found), num_candidates)
            if found.empty:
                log.warning("%s has no key tokens, so it gets no LongPPL", dataset)
