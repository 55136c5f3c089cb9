import json
import math
import subprocess
import sys
import weakref
from pathlib import Path

import numpy
import pytest
import torch
from conftest import LONGLORA, evaluated_model, save_base, tiny_llama, train_tiny
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from longqlora.config.settings import MergeSettings, RopeExtension
from longqlora.data import packing
from longqlora.data.packing import load_held_out
from longqlora.data.token_files import read_tokens
from longqlora.evaluation.evaluated_model import at_commit
from longqlora.modeling.loading import load_model
from longqlora.publishing import merge_report
from longqlora.publishing.merge_report import (
    MergeFiles,
    MergeRejected,
    check_merge,
    compare_distributions,
    compare_models,
    measure,
    merge_adapter,
    precision_that_fits,
)
from longqlora.publishing.model_card import Stage
from longqlora.publishing.model_folder import publish_model

CPU = torch.device("cpu")
IDS = torch.arange(5, 60)[None]


def merge(base, adapter, data, output, card, *, max_perplexity_ratio: float) -> dict:
    return merge_adapter(
        files=MergeFiles(base, str(adapter), data, str(output)),
        card=card,
        settings=MergeSettings(max_perplexity_ratio=max_perplexity_ratio),
        device="cpu",
    )


@pytest.fixture
def publish(model_folder, corpus, tmp_path):
    """Train a few steps, merge and publish; return the merge report and the folder of the published model."""

    def run(base: str = model_folder, rope_scaling: str = "linear", name: str = "merged", tokenizer: str = "", **settings):
        card = train_tiny(base, corpus, tmp_path / f"{name}-adapter", rope_scaling=rope_scaling, **{"steps": 3, **settings})
        weights, output = str(tmp_path / f"{name}-weights"), tmp_path / name
        report = merge(base, f"{output}-adapter", corpus, weights, card, max_perplexity_ratio=2.0)
        places = {"weights": weights, "output": str(output), "base_model": base, "tokenizer": tokenizer or base}
        publish_model(**places, stages=[Stage("My model", card, report)])
        return report, output

    return run


@pytest.fixture(autouse=True)
def short_sample(monkeypatch):
    monkeypatch.setattr(packing, "HELD_OUT_TOKENS", 1024)


def windows_of(tokens, length: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.as_tensor(tokens)
    return [{"input_ids": part, "labels": part} for part in ids.split(length)]


@pytest.mark.parametrize("variant", [{"dora": True}, {"rslora": True}, {"dora": True, "rslora": True, "loraplus_ratio": 4.0}])
def test_variants_of_lora_are_merged_as_trained(publish, tokenizer, tmp_path, variant):
    """Also where the CPU repacks 4-bit layers of these widths for inference: peft cannot take norms of repacked weights."""
    base = save_base(tmp_path / "wide", tokenizer, hidden_size=64, intermediate_size=128)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(base)
        for weight in model.model.layers.parameters():
            if weight.ndim == 2:  # rows of different lengths
                weight *= torch.linspace(0.5, 2, len(weight))[:, None]
        model.save_pretrained(base)
    report, output = publish(base, steps=8, **variant)
    merged = report["models"]["merge: NF4 round trip"]
    assert merged["kl_divergence"] < 1e-4
    assert merged["top_1_agreement"] > 0.98
    assert report["models"]["base, positions scaled, no adapter"]["kl_divergence"] > 0.01
    assert ("DoRA" in (output / "README.md").read_text()) == ("dora" in variant)


# --- measures --------------------------------------------------------------------------------------------------------------


def test_divergence_and_agreement_of_distributions_written_by_hand():
    trained = torch.tensor([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]).log()
    other = torch.tensor([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]]).log()
    found = compare_distributions(trained, other)
    by_hand = (0.5 * math.log(2) - 0.25 * math.log(2)) / 2  # mean over two positions, the second equal
    assert found["kl_divergence"] == pytest.approx(by_hand, rel=1e-5)
    assert found["top_1_agreement"] == 0.5
    assert found["largest_difference"] == pytest.approx(math.log(2), rel=1e-5)


def test_a_model_does_not_diverge_from_itself():
    tokens = numpy.random.default_rng(0).integers(3, 512, 500)
    measured = compare_models({"a": tiny_llama, "b": tiny_llama}, windows_of(tokens, 128))
    assert measured["a"] == measured["b"]
    assert (measured["b"]["kl_divergence"], measured["b"]["top_1_agreement"]) == (0, 1)
    assert measured["a"]["perplexity"] == pytest.approx(math.exp(measured["a"]["mean_nll"]))


def test_others_are_compared_with_the_first_and_each_is_loaded_when_the_one_before_is_gone():
    alive = []

    def loader(scale):
        def load():
            assert not any(reference() is not None for reference in alive)
            model = tiny_llama()
            model.lm_head.weight.data *= scale
            alive.append(weakref.ref(model))
            return model

        return load

    tokens = numpy.random.default_rng(0).integers(3, 512, 300)
    measured = compare_models({"trained": loader(1), "near": loader(1.1), "far": loader(3)}, windows_of(tokens, 64))
    assert 0 < measured["near"]["kl_divergence"] < measured["far"]["kl_divergence"]
    assert measured["far"]["top_1_agreement"] == 1  # a scale changes no order


@pytest.mark.parametrize(("num_tokens", "window"), [(40, 128), (500, 64), (3000, 128)])
def test_distributions_are_those_of_the_model_spread_over_the_text(model, monkeypatch, num_tokens, window):
    monkeypatch.setattr(merge_report, "COMPARED_POSITIONS", 100)
    tokens = numpy.random.default_rng(0).integers(3, 512, num_tokens)
    _, rows = measure(model, windows_of(tokens, window))
    assert 50 < len(rows) <= 200 or num_tokens == len(rows) == 40
    torch.testing.assert_close(rows.exp().sum(-1), torch.ones(len(rows)))
    with torch.no_grad():
        first = model(torch.tensor(tokens[:window])[None]).logits[0].log_softmax(-1)
    every = max(1, num_tokens // 100)
    torch.testing.assert_close(rows[0], first[every - 1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("num_tokens", "window"), [(40, 128), (500, 64)])
def test_the_loss_is_that_of_transformers_over_all_labels(model, num_tokens, window):
    windows = windows_of(numpy.random.default_rng(0).integers(3, 512, num_tokens), window)
    windows[0]["labels"] = windows[0]["labels"].clone()
    windows[0]["labels"][:20] = -100
    total, count = 0.0, 0
    with torch.no_grad():
        for window in windows:
            labels = window["labels"][None]
            number = int((labels[:, 1:] != -100).sum())
            total += float(model(window["input_ids"][None], labels=labels).loss) * number
            count += number
    assert measure(model, windows)[0] == pytest.approx(total / count, rel=1e-5)


def test_distributions_are_taken_from_texts_that_are_shorter_than_the_distance_of_two_places(model, monkeypatch):
    monkeypatch.setattr(merge_report, "COMPARED_POSITIONS", 10)
    tokens = numpy.random.default_rng(0).integers(3, 512, 400)
    _, rows = measure(model, windows_of(tokens, 16))  # a place every 40 tokens
    assert len(rows) == 10


def test_each_model_reads_each_window_once(model, monkeypatch):
    read, forward = [], type(model.model).forward
    monkeypatch.setattr(type(model.model), "forward", lambda self, **given: read.append(1) or forward(self, **given))
    compare_models({"a": tiny_llama, "b": tiny_llama}, windows_of(numpy.arange(300) % 500, 64))
    assert len(read) == 2 * 5


@pytest.mark.parametrize(
    ("num_parameters", "free_gib", "expected"),
    [(6.7e9, 24, "float16"), (13e9, 24, "int8"), (13e9, 32, "float16"), (70e9, 24, "nf4")],
)
def test_models_are_compared_in_a_precision_that_fits(num_parameters, free_gib, expected):
    assert precision_that_fits(int(num_parameters), free_gib * 2**30, "float16") == expected


# --- the gate --------------------------------------------------------------------------------------------------------------


def test_a_merge_that_is_clearly_worse_than_the_adapter_is_refused_with_its_figures():
    check_merge({"perplexity": 10.0}, {"perplexity": 10.5}, 1.05)
    with pytest.raises(
        MergeRejected, match=r"perplexity 10\.6, the adapter as trained 10: a ratio of 1\.06, above merge\.max_perp"
    ):
        check_merge({"perplexity": 10.0}, {"perplexity": 10.6}, 1.05)
    with pytest.raises(MergeRejected):
        check_merge({"perplexity": 10.0}, {"perplexity": float("nan")}, 1.05)


def test_an_adapter_merged_into_other_weights_than_it_was_trained_on_is_not_published(
    model_folder, corpus, tmp_path, tokenizer
):
    card = train_tiny(model_folder, corpus, tmp_path / "adapter", steps=40, method="lora", learning_rate=2e-2)
    untrained = save_base(tmp_path / "other", tokenizer, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    merge(model_folder, tmp_path / "adapter", corpus, tmp_path / "same", card, max_perplexity_ratio=1.05)
    other = AutoModelForCausalLM.from_pretrained(untrained)
    with torch.no_grad():
        other.lm_head.weight.normal_(std=1)
    other.save_pretrained(untrained)
    spoiled = merge_report.merge_weights

    def merge_other(base, *arguments, **kwargs):
        spoiled(untrained, *arguments, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge_report, "merge_weights", merge_other)
        with pytest.raises(MergeRejected, match="so it is not published"):
            merge(model_folder, tmp_path / "adapter", corpus, tmp_path / "different", card, max_perplexity_ratio=1.05)


# --- held-out text ---------------------------------------------------------------------------------------------------------


def test_merges_are_compared_on_text_that_was_not_trained_on(publish, corpus):
    found, folder = publish(steps=1, **LONGLORA)
    num_tokens = len(read_tokens(corpus))
    assert found["sample"] == {"tokens": 1024, "window": 128, "path": corpus, "held_out": True}
    card = (folder / "README.md").read_text()
    assert "on 1,024 tokens in windows of 128: the held-out end of the training data" in card
    windows, _ = load_held_out(corpus, 128)
    expected = read_tokens(corpus)[num_tokens - 1024 :]
    assert torch.cat([window["input_ids"] for window in windows]).tolist() == expected.tolist()


def test_where_the_data_are_too_few_the_report_says_so(publish, monkeypatch):
    monkeypatch.setattr(packing, "MAX_HELD_OUT_SHARE", 0.001)
    found, folder = publish(steps=1, **LONGLORA)
    assert found["sample"]["held_out"] is False
    assert "too few to hold any out" in (folder / "README.md").read_text()


# --- merge_adapter ---------------------------------------------------------------------------------------------------------


def test_a_4_bit_adapter_has_two_merges_and_the_better_one_is_published(publish):
    found, folder = publish()
    rows = found["models"]
    assert list(rows) == [
        "adapter on the NF4 base, as trained", "merge: 16-bit", "merge: NF4 round trip", "base, positions scaled, no adapter"
    ]  # fmt: skip
    merges = {name: row["mean_nll"] for name, row in rows.items() if name.startswith("merge")}
    assert found["published"] == min(merges, key=merges.get)
    assert rows["merge: NF4 round trip"]["kl_divergence"] < rows["merge: 16-bit"]["kl_divergence"]
    assert rows["merge: 16-bit"]["kl_divergence"] < rows["base, positions scaled, no adapter"]["kl_divergence"]
    assert rows["adapter on the NF4 base, as trained"]["kl_divergence"] == 0
    assert found["sample"]["tokens"] == 1024
    assert json.loads((folder / "merge_report.json").read_text()) == found


@pytest.mark.parametrize("better", ["merge: 16-bit", "merge: NF4 round trip"])
def test_whichever_merge_measures_better_is_published_and_the_other_is_gone(
    publish, model_folder, monkeypatch, better, tmp_path
):
    def measure(models, windows):
        row = {
            "perplexity": 9.0,
            "kl_divergence": 0.0,
            "top_1_agreement": 1.0,
            "largest_difference": 0.0,
        }
        kept.update({name: load().eval()(IDS).logits.detach() for name, load in models.items()})
        return {name: {"mean_nll": 1.0 if name == better else 2.0, **row} for name in models}

    kept = {}
    monkeypatch.setattr(merge_report, "compare_models", measure)
    found, folder = publish()
    assert found["published"] == better
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits
    other = ({"merge: 16-bit", "merge: NF4 round trip"} - {better}).pop()
    torch.testing.assert_close(logits, kept[better])
    assert not torch.allclose(logits, kept[other], atol=1e-4)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set()
    assert f"Published: **{better}**" in (folder / "README.md").read_text()


@pytest.mark.parametrize("tied", [False, True])
def test_a_16_bit_adapter_has_one_merge_which_is_the_trained_model(publish, tmp_path, tokenizer, tied):
    base = save_base(tmp_path / "other", tokenizer, tie_word_embeddings=tied)
    found, folder = publish(base, **LONGLORA, steps=6)
    assert list(found["models"]) == [
        "adapter on the 16-bit base, as trained", "merge: 16-bit", "base, positions scaled, no adapter"
    ]  # fmt: skip
    assert found["published"] == "merge: 16-bit"
    assert found["precision"] == {"trained": "float32", "others": "float32"}
    assert found["models"]["merge: 16-bit"]["kl_divergence"] < 1e-6
    assert found["models"]["base, positions scaled, no adapter"]["kl_divergence"] > 1e-3
    adapted = PeftModel.from_pretrained(
        load_model(base, device=CPU, extension=RopeExtension(target_context=128)), f"{folder}-adapter"
    ).eval()
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits
        torch.testing.assert_close(logits, adapted(IDS).logits, atol=1e-4, rtol=1e-3)


def test_a_base_in_16_bit_is_measured_in_16_bit(publish, tmp_path, tokenizer):
    found, folder = publish(save_base(tmp_path / "other", tokenizer, torch.bfloat16), **LONGLORA)
    assert found["precision"] == {"trained": "bfloat16", "others": "bfloat16"}
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


@pytest.mark.parametrize("rope_scaling", ["dynamic", "yarn", "llama3"])
def test_a_published_model_has_the_scaling_it_was_trained_with(publish, rope_scaling):
    found, folder = publish(rope_scaling=rope_scaling, **LONGLORA)
    rope = AutoModelForCausalLM.from_pretrained(folder).config.rope_parameters
    assert (rope["rope_type"], rope["rope_theta"], rope["factor"]) == (rope_scaling, 500000.0, 2.0)
    assert found["models"]["merge: 16-bit"]["kl_divergence"] < 1e-6
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 128


@pytest.mark.process
def test_a_published_model_loads_without_this_project(publish, tmp_path):
    _, folder = publish(steps=1)
    assert AutoTokenizer.from_pretrained(folder).chat_template is None  # it was trained on the corpus
    assert "# My model" in (folder / "README.md").read_text()
    assert (folder / "generation_config.json").exists()
    stock = (
        "import sys; sys.modules['longqlora'] = None\n"  # an import of it would fail
        "from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "GenerationConfig.from_pretrained(sys.argv[1])\n"
        "rope = model.config.rope_parameters\n"
        "assert (rope['rope_type'], rope['factor'], rope['rope_theta']) == ('linear', 2.0, 500000.0), rope\n"
        "assert tokenizer.model_max_length == model.config.max_position_embeddings == 128\n"
        "print(model.generate(**tokenizer('def', return_tensors='pt'), max_new_tokens=4).shape)\n"
    )
    run = subprocess.run([sys.executable, "-c", stock, folder], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "torch.Size" in run.stdout


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_the_tokenizer_that_was_trained_with_is_published_for_a_base_without_one(
    publish, tokenizer, model_folder, tmp_path, method
):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for file in Path(model_folder).glob("*token*"):  # the base has none
        file.unlink()
    _, folder = publish(tokenizer=str(tmp_path / "tokenizer"), method=method, steps=1)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()
    assert GenerationConfig.from_pretrained(folder).eos_token_id == tokenizer.eos_token_id


def test_a_model_trained_on_instructions_has_the_chat_template(publish):
    _, folder = publish(steps=1, data="sft")
    assert "USER:" in AutoTokenizer.from_pretrained(folder).chat_template
    assert "Its prompt is the tokenizer's chat template" in (folder / "README.md").read_text()


def test_a_merge_reads_the_commit_that_was_trained_though_its_branch_has_moved(hub, tmp_path, tokenizer, corpus):
    trained = Path(save_base(tmp_path / "trained", tokenizer))
    commit = hub.add("models/owner/name", trained, "v1")
    card = train_tiny("owner/name@v1", corpus, tmp_path / "adapter", steps=2)
    assert card["base_model"] == f"owner/name@{commit}"
    adapter = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("owner/name", commit)

    hub.add("models/owner/name", Path(save_base(tmp_path / "newer", tokenizer, num_hidden_layers=1)), "v1")
    row = evaluated_model("owner/name@v1", adapter=str(tmp_path / "adapter"))
    assert at_commit(row).path == card["base_model"]
    assert at_commit(evaluated_model("owner/name@v1")).path != card["base_model"]
    report = merge(card["base_model"], tmp_path / "adapter", corpus, tmp_path / "weights", card, max_perplexity_ratio=2.0)
    local = merge(str(trained), tmp_path / "adapter", corpus, tmp_path / "local", card, max_perplexity_ratio=2.0)
    assert report["models"] == local["models"]
    merged = [load_file(tmp_path / folder / "model.safetensors") for folder in ("weights", "local")]
    assert merged[0].keys() == merged[1].keys()
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[0])
