import math

import numpy
import pandas
import pytest
import torch
from conftest import evaluated_model, tiny_llama
from transformers import LlamaForCausalLM

from longqlora.config.settings import Protocol
from longqlora.data.token_files import write_tokens
from longqlora.evaluation.key_tokens import find_key_tokens, key_tokens_of, short_windows
from longqlora.evaluation.perplexity import evaluate_perplexity
from longqlora.evaluation.token_losses import NonFiniteLogits

LONG = Protocol(name="exact", window=48, stride=48)
SHORT = 8
SIZES = [70, 5, 45]  # tokens of the documents
VOCABULARY = 8


@pytest.fixture
def evaluator(tmp_path) -> str:
    """A model of random weights, so large that the losses of its few tokens vary by several nats with the context."""
    tiny_llama(vocab_size=VOCABULARY, initializer_range=0.3).save_pretrained(tmp_path / "evaluator")
    return str(tmp_path / "evaluator")


@pytest.fixture
def stream(tmp_path) -> str:
    rng = numpy.random.default_rng(0)
    documents = [rng.integers(3, VOCABULARY, size - 1).tolist() for size in SIZES]
    write_tokens(tmp_path / "t.bin", documents, vocab_size=VOCABULARY, eos_token_id=2)
    return str(tmp_path / "t.bin")


def find(evaluator, stream, output, protocol=LONG) -> pandas.DataFrame:
    find_key_tokens(
        system="strong",
        model=evaluated_model(evaluator),
        tokens={"text": stream},
        protocol=protocol,
        short_context=SHORT,
        device="cpu",
        outputs={"text": str(output)},
    )
    return pandas.read_parquet(output)


def nll(model, context: numpy.ndarray, token: int) -> float:
    """The loss of a token after a context, in one forward pass of its own."""
    with torch.no_grad():
        logits = model(torch.from_numpy(context.astype("int64"))[None]).logits[0, -1]
    return -torch.log_softmax(logits.double(), -1)[token].item()


def first_read(position: int, begin: int, end: int, window: int, stride: int) -> int:
    """The first token that is read before a token of the document [begin, end), by windows that score ``stride`` tokens."""
    if position <= begin + window:
        return begin
    last = begin + window + stride * math.ceil((position - begin - window) / stride)  # the last token that its window scores
    return max(begin, min(last, end - 1) - window)


def by_hand(model, tokens: numpy.ndarray) -> dict[int, tuple[float, float]]:
    """Position of each key token, with its loss after the long and after the short context, from the paper's definition. The
    short context has 8 or 9 tokens: as in the paper's code, those of K / 4 consecutive tokens begin together."""
    found, begin = {}, 0
    for end in numpy.cumsum(SIZES):
        for position in range(begin + 1, end):
            long = first_read(position, begin, end, LONG.window, LONG.stride)
            short = first_read(position, begin, end, SHORT + 1, 2)
            if long >= short:
                continue
            long_nll, short_nll = (nll(model, tokens[first:position], tokens[position]) for first in (long, short))
            if short_nll - long_nll > 2 and -long_nll > -2:
                found[position] = (long_nll, short_nll)
        begin = end
    return found


def test_the_short_context_has_k_to_a_quarter_more_tokens():
    windows = short_windows([100, 300], 40)
    contexts = [target - begin for _, begin, first, end in windows for target in range(first, end)]
    targets = [target for _, begin, first, end in windows for target in range(first, end)]
    assert targets == [*range(1, 100), *range(101, 300)]  # each token but the first of a document, once
    assert {context for target, context in zip(targets, contexts, strict=True) if target % 100 > 50} == set(range(40, 50))


def test_the_key_tokens_are_those_of_the_definition_one_forward_pass_a_token(evaluator, stream, tmp_path):
    model = LlamaForCausalLM.from_pretrained(evaluator).eval()
    tokens = numpy.fromfile(stream, "<u2")
    expected = by_hand(model, tokens)
    found = find(evaluator, stream, tmp_path / "key.parquet")
    assert found["position"].tolist() == list(expected)
    assert len(found) >= 3
    numpy.testing.assert_allclose(found[["long_nll", "short_nll"]], list(expected.values()), atol=1e-3)


def test_a_token_whose_context_is_not_longer_than_the_short_one_is_no_key_token(monkeypatch):
    """A model whose loss is 1 after any number of tokens but 4, the short context, where it is 4."""

    def losses(model, tokens, skipped=0):
        contexts = torch.arange(1, tokens.shape[1]).expand(len(tokens), -1)[:, skipped:]
        return torch.where(contexts == 4, 4.0, 1.0)

    monkeypatch.setattr("longqlora.evaluation.perplexity.nll_of_batch", losses)
    protocol = Protocol(name="exact", window=12, stride=12)
    found, num_candidates = key_tokens_of(tiny_llama(), numpy.zeros(26, dtype=int), [26], protocol, short_context=4)
    assert found["position"].tolist() == [*range(5, 13), *range(17, 26)]  # the second window begins at 12, the last one at 13
    assert num_candidates == len(found)


# --- LongPPL ---------------------------------------------------------------------------------------------------------------


def measure(model, stream, tmp_path, window: int, key: str | None) -> dict:
    return evaluate_perplexity(
        system="tiny model",
        model=evaluated_model(model),
        tokens={"text": stream},
        protocol=Protocol(name="exact", window=window, stride=window),
        device="cpu",
        windows={"text": str(tmp_path / "w.parquet")},
        key_tokens={"text": key} if key else None,
    )["text"]


@pytest.mark.parametrize("window", [16, 48])
def test_longppl_is_the_perplexity_of_the_key_tokens_in_windows_of_any_length(evaluator, stream, tmp_path, window):
    key, tokens, ends = tmp_path / "key.parquet", numpy.fromfile(stream, "<u2"), numpy.cumsum(SIZES)
    positions = [7, 20, 48, 49, 71, 80, 119]
    pandas.DataFrame({"position": positions}).to_parquet(key)
    model, losses = LlamaForCausalLM.from_pretrained(evaluator).eval(), []
    for position in positions:
        end = ends[ends > position].min()
        begin = end - SIZES[ends.tolist().index(end)]
        losses.append(nll(model, tokens[first_read(position, begin, end, window, window) : position], tokens[position]))
    record = measure(evaluator, stream, tmp_path, window, str(key))
    windows = pandas.read_parquet(tmp_path / "w.parquet")
    assert record["num_key_tokens"] == windows["num_key_tokens"].sum() == len(positions)
    assert record["longppl"] == pytest.approx(math.exp(numpy.mean(losses)), rel=1e-3)
    assert record["key_mean_nll"] == pytest.approx(windows["key_nll"].sum() / len(positions))
    residuals = windows["key_nll"] - record["key_mean_nll"] * windows["num_key_tokens"]
    count = len(windows)
    error = math.sqrt(count / (count - 1) * (residuals**2).sum()) / len(positions)  # of a ratio of sums over windows
    assert record["key_standard_error"] == pytest.approx(error)


def test_key_tokens_change_nothing_else(evaluator, stream, tmp_path):
    pandas.DataFrame({"position": [7, 20]}).to_parquet(tmp_path / "key.parquet")
    without = measure(evaluator, stream, tmp_path, 48, None)
    with_key_tokens = measure(evaluator, stream, tmp_path, 48, str(tmp_path / "key.parquet"))
    added = {"num_key_tokens", "key_mean_nll", "key_standard_error", "longppl"}
    assert with_key_tokens == without | {key: with_key_tokens[key] for key in added}


def test_without_key_tokens_there_is_no_longppl(evaluator, stream, tmp_path):
    pandas.DataFrame({"position": numpy.zeros(0, dtype=int)}).to_parquet(tmp_path / "key.parquet")
    record = measure(evaluator, stream, tmp_path, 48, str(tmp_path / "key.parquet"))
    assert (record["num_key_tokens"], record["longppl"], record["key_standard_error"]) == (0, None, None)


# --- what cannot be ---------------------------------------------------------------------------------------------------------


def test_an_evaluator_whose_context_is_too_short_is_refused(evaluator, stream, tmp_path):
    protocol = Protocol(name="exact", window=128, stride=128)
    with pytest.raises(ValueError, match=r"key_tokens\.system: strong has a context of 64 tokens, less than .*lengths, 128"):
        find(evaluator, stream, tmp_path / "key.parquet", protocol)


def test_a_set_of_another_tokenizer_is_refused(evaluator, tmp_path):
    write_tokens(tmp_path / "t.bin", [[400, 5]], vocab_size=512, eos_token_id=2)
    with pytest.raises(ValueError, match=r"holds token id 400, but the vocabulary of .*evaluator ends at 7"):
        find(evaluator, tmp_path / "t.bin", tmp_path / "key.parquet")


def test_a_loss_that_is_not_a_number_is_an_error(stream, tmp_path):
    model = tiny_llama(vocab_size=VOCABULARY)
    with torch.no_grad():
        model.lm_head.weight[5, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(NonFiniteLogits, match="tokens 0 to 48: the loss is not a number"):
        find(tmp_path / "broken", stream, tmp_path / "key.parquet")
