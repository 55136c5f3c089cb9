import numpy
import pytest
import torch
from conftest import save_base
from torch.nn.functional import cross_entropy

from longqlora.config.settings import RopeExtension
from longqlora.data.packing import read_tokenized_records
from longqlora.data.token_files import IGNORED
from longqlora.evaluation.choose_scaling import MIN_TOKENS, MIN_WINDOWS, choose_scaling, last_windows
from longqlora.evaluation.token_losses import NonFiniteLogits
from longqlora.modeling.loading import load_model

CPU = torch.device("cpu")


def choose(base_model: str, data: str, **changes) -> dict:
    how = {"target_context": 512, "precision": "float32", "device": "cpu"} | changes
    return choose_scaling(base_model=base_model, data=data, **how)


def write_records(folder, lengths: list[int]) -> str:
    """A tokenized instruction set whose loss covers the last half of each record."""
    import datasets

    rng = numpy.random.default_rng(0)
    ids = [rng.integers(3, 512, length).tolist() for length in lengths]
    labels = [[IGNORED] * (len(row) // 2) + row[len(row) // 2 :] for row in ids]
    datasets.Dataset.from_dict({"input_ids": ids, "labels": labels}).save_to_disk(str(folder))
    (file,) = folder.glob("*.arrow")
    return str(file)


def test_the_scaling_with_the_lowest_loss_of_the_untrained_model_on_the_last_windows_is_chosen(model_folder, corpus):
    choice = choose(model_folder, corpus)
    assert (choice["windows"], choice["tokens"]) == (MIN_TOKENS // 512, MIN_TOKENS)
    assert list(choice["scalings"]) == ["linear", "ntk", "yarn", "llama3"]
    end = torch.from_numpy(numpy.fromfile(corpus, "<u2")[-MIN_TOKENS:].astype("int64")).view(-1, 512)
    for scaling, found in choice["scalings"].items():
        extension = RopeExtension(scaling=scaling, target_context=512)
        model = load_model(model_folder, device=CPU, extension=extension).eval()
        with torch.no_grad():
            losses = cross_entropy(model(end).logits[:, :-1].transpose(1, 2), end[:, 1:], reduction="none").mean(1)
        assert found["mean_nll"] == pytest.approx(losses.mean().item(), abs=1e-5)
        assert found["standard_error"] == pytest.approx(losses.std().item() / len(losses) ** 0.5, rel=1e-3)
    assert choice["chosen"] == min(choice["scalings"], key=lambda scaling: choice["scalings"][scaling]["mean_nll"])
    assert choose(model_folder, corpus) == choice  # nothing in it depends on the time or the code


def test_it_reads_at_least_four_windows_of_the_target_or_all_there_are(corpus, tmp_path):
    tokens = numpy.fromfile(corpus, "<u2")
    long = last_windows(corpus, 8192)
    assert [len(window["input_ids"]) for window in long] == [8192] * MIN_WINDOWS
    assert (torch.cat([window["input_ids"] for window in long]).numpy() == tokens[-MIN_WINDOWS * 8192 :]).all()
    tokens[:700].tofile(tmp_path / "short.bin")
    assert [len(window["input_ids"]) for window in last_windows(str(tmp_path / "short.bin"), 512)] == [512, 188]


def test_of_instructions_the_last_records_are_read_and_the_loss_covers_their_answers(model_folder, tmp_path):
    path = write_records(tmp_path / "many", [300] * 100)
    assert len(last_windows(path, 512)) == 55  # the fewest with 16,384 tokens
    few = write_records(tmp_path / "few", [300, 200])
    (found,) = {loss["mean_nll"] for scaling, loss in choose(model_folder, few)["scalings"].items() if scaling == "linear"}
    model = load_model(model_folder, device=CPU, extension=RopeExtension(target_context=512)).eval()
    losses = []
    for row in read_tokenized_records(few):
        with torch.no_grad():
            logits = model(row["input_ids"][None]).logits[0, :-1]
        losses.append(cross_entropy(logits, row["labels"][1:], ignore_index=IGNORED, reduction="sum").item())
    assert found == pytest.approx(sum(losses) / 250, abs=1e-5)


def test_a_4_bit_base_is_measured_as_it_is_trained(model_folder, corpus):
    exact, quantized = (choose(model_folder, corpus, precision=precision) for precision in ("float32", "nf4"))
    assert quantized["precision"] == "nf4"
    for scaling, loss in exact["scalings"].items():
        assert 0 < abs(quantized["scalings"][scaling]["mean_nll"] - loss["mean_nll"]) < 0.1


def test_a_scaled_model_has_only_its_own_scaling_to_choose(tokenizer, tmp_path, corpus):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 2.0, "original_max_position_embeddings": 32}
    base = save_base(tmp_path / "scaled", tokenizer, rope_parameters={**rope, "low_freq_factor": 1.0, "high_freq_factor": 4.0})
    choice = choose(base, corpus)
    assert (choice["chosen"], list(choice["scalings"])) == ("llama3", ["llama3"])


def test_what_cannot_be_extended_is_refused_before_weights_are_loaded(model_folder, corpus):
    with pytest.raises(ValueError, match=r"target_context 64 is the model's own context: rope_scaling: best has nothing"):
        choose(model_folder, corpus, target_context=64)
    with pytest.raises(ValueError, match="target_context 32 is below the model's own context of 64 tokens"):
        choose(model_folder, corpus, target_context=32)


def test_a_loss_that_is_not_a_number_is_no_choice(tmp_path, tokenizer, corpus):
    base = save_base(tmp_path / "broken", tokenizer)
    model = load_model(base, device=CPU)
    model.model.norm.weight.data[:] = float("nan")
    model.save_pretrained(base)
    with pytest.raises(NonFiniteLogits, match="broken with rope_scaling linear: the loss is not a number"):
        choose(base, corpus)
