import math

import numpy
import pytest
import torch
from conftest import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MptConfig, MptForCausalLM

from longqlora import perplexity
from longqlora.models import context_of, load_model
from longqlora.perplexity import Perplexity, evaluate_perplexity, rolling_windows, score
from longqlora.tokens import write_tokens


def test_windows_written_by_hand():
    assert list(rolling_windows(10, window=4, stride=4)) == [(0, 4, 4), (4, 8, 4), (8, 9, 1)]
    assert list(rolling_windows(10, window=4, stride=2)) == [(0, 4, 4), (2, 6, 2), (4, 8, 2), (6, 9, 1)]
    assert list(rolling_windows(3, window=100, stride=100)) == [(0, 2, 2)]


@settings(max_examples=200)
@given(num_tokens=st.integers(2, 200), window=st.integers(1, 50), data=st.data())
def test_every_token_but_the_first_is_scored_exactly_once(num_tokens, window, data):
    stride = data.draw(st.integers(1, window))
    scored = []
    for begin, end, count in rolling_windows(num_tokens, window, stride):
        assert 0 <= begin < end <= num_tokens - 1
        assert end - begin <= window
        scored.extend(range(end - count + 1, end + 1))
    assert scored == list(range(1, num_tokens))


@pytest.mark.parametrize(
    ("num_tokens", "window", "stride", "message"), [(9, 4, 5, "stride 5"), (9, 4, 0, "stride 0"), (1, 4, 4, "nothing to score")]
)
def test_impossible_windows_are_refused(num_tokens, window, stride, message):
    with pytest.raises(ValueError, match=message):
        list(rolling_windows(num_tokens, window, stride))


def naive_mean_nll(model, tokens, window, stride):
    """One forward pass a token, from the definition."""
    losses = []
    for begin, end, count in rolling_windows(len(tokens), window, stride):
        for target in range(end - count + 1, end + 1):
            with torch.no_grad():
                logits = model(torch.tensor(tokens[begin:target])[None]).logits[0, -1]
            losses.append(-torch.log_softmax(logits.double(), -1)[tokens[target]].item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 5), (64, 64), (7, 7)])
def test_equals_one_forward_pass_a_token(model, monkeypatch, window, stride):
    monkeypatch.setattr(perplexity, "POSITIONS_PER_CHUNK", 8)  # chunks that do not divide the window
    tokens = numpy.random.default_rng(0).integers(0, 512, 60)
    result = score(model, tokens, window, stride)
    assert result.num_scored.sum() == 59
    assert result.mean_nll == pytest.approx(naive_mean_nll(model, tokens, window, stride), abs=1e-5)


def test_the_batch_does_not_change_the_sums(model, monkeypatch):
    tokens = numpy.random.default_rng(0).integers(0, 512, 200)
    together = score(model, tokens, 16, 16)
    monkeypatch.setattr(perplexity, "TOKENS_PER_BATCH", 1)
    alone = score(model, tokens, 16, 16)
    numpy.testing.assert_allclose(together.nll_sums, alone.nll_sums, atol=1e-4)


def test_the_mean_is_weighted_by_tokens_and_the_standard_error_is_that_of_the_mean():
    result = Perplexity(num_tokens=12, nll_sums=numpy.array([10.0, 1.0]), num_scored=numpy.array([10, 1]))
    assert result.mean_nll == 1.0
    assert result.standard_error == 0.0  # both windows have the same mean
    draws = numpy.random.default_rng(0).normal(3.0, 0.5, (4000, 25))
    errors = [Perplexity(0, 8 * row, numpy.full(25, 8)).standard_error for row in draws]
    assert numpy.mean(errors) == pytest.approx(0.5 / math.sqrt(25), rel=0.05)


def test_a_record_says_what_was_scored(model_folder, tmp_path, texts, tokenizer):
    path = tmp_path / "x.bin"
    ids = tokenizer(texts[0][:3000], add_special_tokens=False)["input_ids"]
    write_tokens(path, [ids], vocab_size=512, eos_token_id=2)
    record = evaluate_perplexity(
        model_path=model_folder,
        rope_context=128,
        rope_scaling="linear",
        tokens_path=str(path),
        window=32,
        stride=32,
        precision="float32",
        device="cpu",
    )
    assert record["num_tokens"] == len(ids) + 1
    assert record["num_scored"] + record["num_unscored"] == record["num_tokens"]
    assert record["num_unscored"] == 1
    assert record["model_context"] == 128
    assert record["perplexity"] == pytest.approx(math.exp(record["mean_nll"]))
    assert 100 < record["perplexity"] < 1000  # random weights: near the size of the vocabulary, 512


def test_a_loss_that_is_not_a_number_is_an_error():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[3, 0] = float("nan")
    with pytest.raises(ValueError, match="window 0 of 4: the loss is not a number"):
        score(model, numpy.random.default_rng(0).integers(0, 512, 60), 16, 16)


def test_a_model_without_rotary_positions_is_evaluated_as_it_is(tmp_path):
    torch.manual_seed(0)
    config = MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=512)
    MptForCausalLM(config).save_pretrained(tmp_path / "mpt")
    ids = numpy.random.default_rng(0).integers(3, 512, 65).tolist()
    write_tokens(tmp_path / "t.bin", [ids[:-1]], vocab_size=512, eos_token_id=ids[-1])
    record = evaluate_perplexity(
        model_path=str(tmp_path / "mpt"),
        rope_context=None,
        rope_scaling="linear",
        tokens_path=str(tmp_path / "t.bin"),
        window=64,
        stride=64,
        precision="float32",
        device="cpu",
    )
    model, tokens = MptForCausalLM.from_pretrained(tmp_path / "mpt").eval(), torch.tensor([ids])
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).logits[0], tokens[0, 1:]).item()
    assert record["mean_nll"] == pytest.approx(expected, abs=1e-5)
    assert record["model_context"] == context_of(model.config) == 64
    assert record["num_scored"] == 64


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn", "llama3"])
def test_an_untrained_model_is_evaluated_with_the_scaling_that_is_asked_for(model_folder, tmp_path, rope_type):
    ids = numpy.random.default_rng(0).integers(3, 512, 128).tolist()
    write_tokens(tmp_path / "t.bin", [ids], vocab_size=512, eos_token_id=2)
    found = evaluate_perplexity(
        model_path=model_folder,
        rope_context=128,
        rope_scaling=rope_type,
        tokens_path=str(tmp_path / "t.bin"),
        window=128,
        stride=128,
        precision="float32",
        device="cpu",
    )
    model = load_model(model_folder, device=torch.device("cpu"), context_length=128, rope_type=rope_type).eval()
    tokens = torch.tensor([[*ids, 2]])
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:]).item()
    assert found["mean_nll"] == pytest.approx(expected, abs=1e-5)
