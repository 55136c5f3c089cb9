import math

import numpy
import pandas
import pytest
import torch
from conftest import evaluated_model, tiny_llama
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, MptConfig, MptForCausalLM

from longqlora.config.settings import Protocol, RopeExtension
from longqlora.data.token_files import write_tokens
from longqlora.evaluation import perplexity, token_losses
from longqlora.evaluation.perplexity import evaluate_perplexity, position_edges, score_windows
from longqlora.evaluation.protocols import Window, make_windows
from longqlora.evaluation.token_losses import NonFiniteLogits, batches_of
from longqlora.jobs.launch import launch
from longqlora.modeling.loading import load_model

CPU = torch.device("cpu")


def exact(window: int, stride: int | None = None) -> Protocol:
    return Protocol(name="exact", window=window, stride=stride or window)


def random_tokens(count: int, seed: int = 0) -> numpy.ndarray:
    return numpy.random.default_rng(seed).integers(3, 512, count)


def write_stream(path, sizes: list[int], seed: int = 0) -> str:
    """Documents of these sizes, their end-of-text tokens counted."""
    documents = [random_tokens(size - 1, seed + number).tolist() for number, size in enumerate(sizes)]
    write_tokens(path, documents, vocab_size=512, eos_token_id=2)
    return str(path)


def evaluate(model, tokens_path, windows_path, *, window=32, stride=None, protocol="exact", **fields) -> dict:
    return evaluate_perplexity(
        system="tiny model",
        model=evaluated_model(model, **fields),
        tokens={"random text": str(tokens_path)},
        protocol=Protocol(name=protocol, window=window, stride=stride or window),
        device="cpu",
        windows={"random text": str(windows_path)},
    )["random text"]


# --- scoring ---------------------------------------------------------------------------------------------------------------


def nll_by_token(model, tokens, windows: list[Window]) -> list[list[float]]:
    """For each window the loss of each scored token, one forward pass a token, from the definition."""
    losses = []
    for _, begin, first, end in windows:
        losses.append([])
        for target in range(first, end):
            with torch.no_grad():
                logits = model(torch.tensor(tokens[begin:target])[None]).logits[0, -1]
            losses[-1].append(-torch.log_softmax(logits.double(), -1)[tokens[target]].item())
    return losses


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 5), (64, 64), (7, 3)])
def test_scoring_equals_one_forward_pass_a_token(model, monkeypatch, window, stride):
    monkeypatch.setattr("longqlora.evaluation.token_losses.POSITIONS_PER_CHUNK", 8)  # chunks that do not divide the window
    tokens, windows = random_tokens(60), make_windows([23, 24, 26, 60], exact(window, stride))
    by_window, by_position = score_windows(model, tokens, windows)
    expected = nll_by_token(model, tokens, windows)
    assert by_window["document"].tolist() == [part.document for part in windows]
    assert by_window["begin"].tolist() == [part.begin for part in windows]
    assert by_window["num_scored"].tolist() == [len(losses) for losses in expected]
    numpy.testing.assert_allclose(by_window["nll"], [sum(losses) for losses in expected], atol=1e-4)
    for row, following in zip(by_position.itertuples(), [*by_position["tokens_before"][1:], 10**9], strict=True):
        inside = [
            loss
            for (_, begin, first, _), losses in zip(windows, expected, strict=True)
            for token, loss in enumerate(losses, start=first)
            if row.tokens_before <= token - begin < following
        ]
        assert (row.num_scored, row.nll) == (len(inside), pytest.approx(sum(inside), abs=1e-4))


def test_the_batch_and_its_padding_change_nothing(model, monkeypatch):
    tokens, windows = random_tokens(200), make_windows([3, 30, 71, 150, 200], exact(16, 7))
    lengths = [window.num_read for window in windows]
    assert len(batches_of(lengths)) == 1
    together = score_windows(model, tokens, windows)
    monkeypatch.setattr(token_losses, "TOKENS_PER_BATCH", 1)
    assert len(batches_of(lengths)) == len(windows)
    for batched, alone in zip(together, score_windows(model, tokens, windows), strict=True):
        numpy.testing.assert_allclose(batched, alone, atol=1e-4)


def test_a_short_window_is_scored_from_its_beginning_in_a_batch_with_a_long_one_that_is_not(model):
    tokens, windows = random_tokens(40), [Window(0, 0, 10, 17), Window(0, 20, 21, 30)]
    by_window, _ = score_windows(model, tokens, windows)
    expected = nll_by_token(model, tokens, windows)
    numpy.testing.assert_allclose(by_window["nll"], [sum(losses) for losses in expected], atol=1e-4)


# --- loss by position ------------------------------------------------------------------------------------------------------


def test_positions_are_binned_by_quarters_of_an_octave():
    assert position_edges(1).tolist() == [1, 2]
    assert position_edges(8).tolist() == [1, 2, 3, 4, 5, 6, 7, 9]  # no bin for the last position alone
    assert position_edges(70).tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 13, 16, 19, 23, 27, 32, 38, 45, 54, 64, 71]


@pytest.mark.parametrize("window", [1, 2, 5, 64, 100, 8192])
def test_every_position_lies_in_one_bin(window):
    edges = position_edges(window)
    assert (edges[0], edges[-1]) == (1, window + 1)
    assert (numpy.diff(edges) > 0).all()


def test_the_bins_hold_the_losses_of_their_positions(monkeypatch):
    """A model whose loss at each token is the number of tokens before it."""

    def losses(model, tokens, skipped=0):
        return torch.arange(1, tokens.shape[1]).float().expand(len(tokens), -1)[:, skipped:]

    monkeypatch.setattr(perplexity, "nll_of_batch", losses)
    windows = make_windows([21, 26], exact(16, 4))
    by_window, by_position = score_windows(tiny_llama(), random_tokens(26), windows)
    assert by_window["nll"].tolist() == [sum(range(1, 17)), 13 + 14 + 15 + 16, 1 + 2 + 3 + 4]
    found = {row.tokens_before: (row.num_scored, row.nll) for row in by_position.itertuples()}
    assert found == {
        **{n: (2, 2 * n) for n in (1, 2, 3, 4)}, **{n: (1, n) for n in (5, 6, 7)},
        8: (2, 8 + 9), 10: (1, 10), 11: (2, 11 + 12), 13: (8, 2 * (13 + 14 + 15 + 16)),
    }  # fmt: skip


@pytest.mark.parametrize(("protocol", "stride"), [("exact", 64), ("exact", 10), ("longqlora", 64), ("longlora", 32)])
def test_the_losses_by_position_add_up_to_all(model, protocol, stride):
    windows = make_windows([100, 250, 300], Protocol(name=protocol, window=64, stride=stride))
    by_window, by_position = score_windows(model, random_tokens(300), windows)
    assert by_position["num_scored"].sum() == by_window["num_scored"].sum() == sum(part.num_scored for part in windows)
    assert by_position["nll"].sum() == pytest.approx(by_window["nll"].sum(), rel=1e-9)
    assert (by_position["num_scored"] > 0).all()


# --- the published protocols -----------------------------------------------------------------------------------------------


def window_loss(model, ids: torch.Tensor) -> float:
    with torch.no_grad():
        return model(input_ids=ids[None], labels=ids[None]).loss.item()


def published_longlora(model, data: torch.Tensor, seq_len: int, stride: int) -> float:
    """The loop of LongLoRA's eval.py."""
    starts = list(range(0, len(data) - seq_len, stride))
    starts.pop()
    return math.exp(numpy.mean([window_loss(model, data[start : start + seq_len]) for start in starts]))


def published_longqlora(model, data: torch.Tensor, seq_len: int) -> float:
    """The pieces of LongQLoRA's evaluation data set; the last one may be shorter."""
    pieces = [data[start : start + seq_len] for start in range(0, len(data), seq_len)]
    return math.exp(numpy.mean([window_loss(model, piece) for piece in pieces]))


@pytest.mark.parametrize("sizes", [[40, 13, 147], [200, 9], [8, 193]])
def test_the_published_protocols_give_what_the_published_loops_give(model_folder, tmp_path, sizes):
    path = write_stream(tmp_path / "t.bin", sizes)
    data = torch.tensor(numpy.fromfile(path, "<u2").astype("int64"))
    model = LlamaForCausalLM.from_pretrained(model_folder).eval()
    for seq_len, stride in [(64, 16), (32, 32), (33, 8)]:
        found = evaluate(model_folder, path, tmp_path / "w.parquet", window=seq_len, stride=stride, protocol="longlora")
        assert found["perplexity"] == pytest.approx(published_longlora(model, data, seq_len, stride), rel=1e-5)
    for seq_len in (64, 33):
        found = evaluate(model_folder, path, tmp_path / "w.parquet", window=seq_len, protocol="longqlora")
        assert found["perplexity"] == pytest.approx(published_longqlora(model, data, seq_len), rel=1e-5)


# --- records ---------------------------------------------------------------------------------------------------------------


def test_the_result_describes_the_measurement_and_the_windows_are_written(model_folder, tmp_path):
    path = write_stream(tmp_path / "t.bin", [80, 33, 5])
    record = evaluate(model_folder, path, tmp_path / "w.parquet", stride=16, extension=RopeExtension(target_context=128))
    windows = pandas.read_parquet(tmp_path / "w.parquet")
    assert (record["num_tokens"], record["num_scored"], record["num_documents"]) == (118, 79 + 32 + 4, 3)
    assert record["num_windows"] == len(windows)
    assert list(windows) == ["document", "begin", "num_scored", "nll"]
    assert record["mean_nll"] == pytest.approx(windows["nll"].sum() / windows["num_scored"].sum())
    assert record["perplexity"] == pytest.approx(math.exp(record["mean_nll"]))
    assert 100 < record["perplexity"] < 1000  # random weights: near the size of the vocabulary, 512
    assert 0 < record["standard_error"] < 1
    assert record["standard_error_units"] == "windows"
    stamp = {"protocol": "exact", "window": 32, "stride": 16, "precision": "float32", "attention": "full", "weights": "model"}
    assert stamp.items() <= record.items()
    assert (record["model_context"], record["is_within_context"], record["dataset_warning"]) == (128, True, None)
    assert sum(record["loss_by_position"]["num_scored"]) == record["num_scored"]


@pytest.mark.parametrize("protocol", ["exact", "longqlora"])
def test_a_set_shorter_than_a_window_is_scored(model_folder, tmp_path, protocol):
    path = write_stream(tmp_path / "t.bin", [20])
    record = evaluate(model_folder, path, tmp_path / "w.parquet", window=64, protocol=protocol)
    assert (record["num_windows"], record["num_scored"], record["standard_error"]) == (1, 19, None)


def test_a_window_beyond_the_context_is_scored_and_marked(model_folder, tmp_path):
    path = write_stream(tmp_path / "t.bin", [200])
    assert evaluate(model_folder, path, tmp_path / "w.parquet", window=128)["is_within_context"] is False
    assert evaluate(model_folder, path, tmp_path / "w.parquet", window=64)["is_within_context"] is True


def test_a_warning_about_the_set_is_recorded(model_folder, tmp_path):
    path = write_stream(tmp_path / "t.bin", [40])
    described = (tmp_path / "t.json").read_text()
    (tmp_path / "t.json").write_text(described[:-1] + ', "warning": "another tokenizer?"}')
    assert evaluate(model_folder, path, tmp_path / "w.parquet")["dataset_warning"] == "another tokenizer?"


def test_a_loss_that_is_not_a_number_names_system_set_length_and_window(tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[511, 0] = float("nan")  # spoils the windows that read this token
    model.save_pretrained(tmp_path / "broken")
    ids = [5] * 40 + [511] + [5] * 22
    write_tokens(tmp_path / "t.bin", [ids], vocab_size=512, eos_token_id=2)
    message = "tiny model on random text at 16 tokens: window 2 of 4, tokens 32 to 48: the loss is not a number"
    with pytest.raises(NonFiniteLogits, match=message):
        evaluate(tmp_path / "broken", tmp_path / "t.bin", tmp_path / "w.parquet", window=16)
    assert not (tmp_path / "w.parquet").exists()


def test_a_set_of_another_tokenizer_is_refused(tmp_path):
    tiny_llama(vocab_size=256).save_pretrained(tmp_path / "small")
    write_tokens(tmp_path / "t.bin", [[400, 5]], vocab_size=512, eos_token_id=2)
    with pytest.raises(ValueError, match=r"holds token id 400, but the vocabulary of .*small ends at 255"):
        evaluate(tmp_path / "small", tmp_path / "t.bin", tmp_path / "w.parquet")


# --- several processes -----------------------------------------------------------------------------------------------------


@pytest.fixture
def single_thread():
    """As each of several processes has: the order of a sum may depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.distributed
def test_two_processes_give_what_one_gives_bit_for_bit(model_folder, tmp_path, monkeypatch, single_thread):
    path, records = write_stream(tmp_path / "t.bin", [9000, 70, 12000, 3, 9000]), []
    for processes in (1, 2):
        answer = launch(
            evaluate_perplexity,
            num_processes=processes,
            threads=processes,
            system="tiny model",
            model=evaluated_model(model_folder),
            tokens={"random text": path},
            protocol=exact(64, 40),
            device="cpu",
            windows={"random text": str(tmp_path / f"{processes}.parquet")},
        )
        records.append(answer)
    one, two = (pandas.read_parquet(tmp_path / f"{processes}.parquet") for processes in (1, 2))
    windows = make_windows([9000, 9070, 21070, 21073, 30073], exact(64, 40))
    assert len(batches_of([window.num_read for window in windows])) > 3  # both have something to do
    pandas.testing.assert_frame_equal(one, two, check_exact=True)
    assert records[0] == records[1]  # loss_by_position and all


def test_a_set_with_nothing_to_score_is_told_before_a_model_is_loaded(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(perplexity, "load_evaluated_model", lambda *given: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="nothing to score"):
        evaluate(model_folder, write_stream(tmp_path / "t.bin", [2]), tmp_path / "w.parquet", window=64, protocol="longlora")


def test_each_set_gets_what_it_gets_alone(model_folder, tmp_path):
    streams = {
        name: write_stream(tmp_path / f"{name}.bin", sizes, seed)
        for seed, (name, sizes) in enumerate([("a", [300, 70]), ("b", [90])])
    }
    both = evaluate_perplexity(
        system="tiny model",
        model=evaluated_model(model_folder),
        tokens=streams,
        protocol=exact(64, 64),
        device="cpu",
        windows={name: str(tmp_path / f"{name}.parquet") for name in streams},
    )
    for name, stream in streams.items():
        assert both[name] == evaluate(model_folder, stream, tmp_path / "alone.parquet", window=64)
        pandas.testing.assert_frame_equal(*(pandas.read_parquet(tmp_path / f"{file}.parquet") for file in (name, "alone")))


# --- models ----------------------------------------------------------------------------------------------------------------


def test_a_model_without_rotary_positions_is_evaluated_as_it_is(tmp_path):
    torch.manual_seed(0)
    config = MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=512)
    MptForCausalLM(config).save_pretrained(tmp_path / "mpt")
    path = write_stream(tmp_path / "t.bin", [65])
    record = evaluate(tmp_path / "mpt", path, tmp_path / "w.parquet", window=64)
    model = MptForCausalLM.from_pretrained(tmp_path / "mpt").eval()
    tokens = torch.tensor(numpy.fromfile(path, "<u2").astype("int64"))[None]
    with torch.no_grad():
        expected = cross_entropy(model(tokens[:, :-1]).logits[0], tokens[0, 1:]).item()
    assert record["mean_nll"] == pytest.approx(expected, abs=1e-5)
    assert (record["model_context"], record["num_scored"]) == (64, 64)


@pytest.mark.parametrize("rope_scaling", ["linear", "dynamic", "yarn", "llama3"])
def test_an_untrained_model_is_evaluated_with_the_configured_scaling(model_folder, tmp_path, rope_scaling):
    path = write_stream(tmp_path / "t.bin", [129])
    extension = RopeExtension(scaling=rope_scaling, target_context=128)
    record = evaluate(model_folder, path, tmp_path / "w.parquet", window=128, extension=extension)
    assert record["is_within_context"] is True
    model = load_model(model_folder, device=CPU, extension=extension).eval()
    tokens = torch.tensor(numpy.fromfile(path, "<u2").astype("int64"))[None]
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
    expected = cross_entropy(logits[0], tokens[0, 1:]).item()
    assert record["mean_nll"] == pytest.approx(expected, abs=1e-5)
