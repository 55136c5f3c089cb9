import json
import weakref
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conftest import LONGLORA, SETTINGS, save_base
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from longqlora.config.settings import RopeExtension
from longqlora.modeling.loading import load_config, load_model
from longqlora.modeling.model_files import weight_files
from longqlora.publishing.merging import Adapter, merge_weights
from longqlora.publishing.weights import read_weights, write_weights
from longqlora.training.adapters import add_adapter

CPU = torch.device("cpu")
IDS = torch.arange(5, 60)[None]
VARIANTS = [{"dora": True}, {"rslora": True}]
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def save_adapter(base: str, folder, **settings) -> str:
    """An adapter with random weights, as large as those of training."""
    model = add_adapter(load_model(base, device=CPU), SETTINGS.model_copy(update={"method": "lora", **settings}), base=None)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=0.1)
    model.save_pretrained(folder)
    return str(folder)


def merge(base: str, adapter: str, output: Path, *, from_nf4: bool = False) -> Path:
    config = load_config(base, RopeExtension(target_context=128))
    merge_weights(base, adapter, output, config=config, from_nf4=from_nf4, device=CPU)
    return output


def merged_by_peft(base: str, adapter: str) -> torch.nn.Module:
    """The whole model merged in memory, in the precision of the base."""
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype="auto", config=load_config(base, RopeExtension(target_context=128))
    )
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def rewrite(base: str, form: str) -> None:
    """Bring a checkpoint into another form."""
    folder = Path(base)
    weights = load_file(folder / "model.safetensors")
    if form == "sharded":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="60KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 1
    elif form != "single":
        (folder / "model.safetensors").unlink()
        is_old = form == "old pytorch_model.bin"  # of torch before 1.6
        if form != "sharded pytorch_model.bin":
            torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not is_old)
            return
        names = sorted(weights)
        parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
        for file, part in parts.items():
            torch.save({name: weights[name] for name in part}, folder / file)
        weight_map = {name: file for file, part in parts.items() for name in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


FORMS = ["single", "sharded", "pytorch_model.bin", "old pytorch_model.bin", "sharded pytorch_model.bin"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "settings",
    [{}, LONGLORA, *VARIANTS, {"dora": True, "rslora": True, **LONGLORA}],
    ids=["all-linear", "longlora", "dora", "rslora", "both and longlora"],
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_shard_by_shard_equals_the_whole_model_merged_by_peft(tmp_path, tokenizer, form, settings, tied):
    base = save_base(tmp_path / "base", tokenizer, tie_word_embeddings=tied)
    adapter = save_adapter(base, tmp_path / "adapter", **settings)
    expected = merged_by_peft(base, adapter).state_dict()
    rewrite(base, form)
    merged = AutoModelForCausalLM.from_pretrained(merge(base, adapter, tmp_path / "merged")).state_dict()
    assert set(merged) == set(expected)
    for name, weight in merged.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("form", ["single", "pytorch_model.bin"])
def test_a_16_bit_base_becomes_a_16_bit_model(tmp_path, tokenizer, form):
    base = save_base(tmp_path / "base", tokenizer, torch.bfloat16)
    adapter = save_adapter(base, tmp_path / "adapter", **LONGLORA)
    rewrite(base, form)
    stored = dict(read_weights(merge(base, adapter, tmp_path / "merged")))
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
    expected = merged_by_peft(base, adapter).state_dict()
    for name, weight in stored.items():
        torch.testing.assert_close(weight, expected[name], atol=2e-3, rtol=2**-7)  # peft rounds the product as well
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


@pytest.mark.parametrize("names", [[HEAD], [EMBEDDINGS], [EMBEDDINGS, HEAD]])
@pytest.mark.parametrize("settings", [{}, LONGLORA], ids=["all-linear", "longlora"])
def test_a_tied_weight_may_be_stored_under_either_name_or_both(tmp_path, tokenizer, names, settings):
    base = save_base(tmp_path / "base", tokenizer, tie_word_embeddings=True)
    adapter = save_adapter(base, tmp_path / "adapter", **settings)
    expected = merged_by_peft(base, adapter).eval()
    weights = load_file(f"{base}/model.safetensors")
    shared = weights.pop(EMBEDDINGS)
    save_file(weights | {name: shared.clone() for name in names}, f"{base}/model.safetensors", metadata={"format": "pt"})
    folder = merge(base, adapter, tmp_path / "merged")
    assert HEAD not in dict(read_weights(folder))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits
        torch.testing.assert_close(logits, expected(IDS).logits, atol=1e-5, rtol=1e-4)


def test_a_head_trained_whole_is_in_the_merged_model(tmp_path, tokenizer):
    base = save_base(tmp_path / "base", tokenizer, tie_word_embeddings=False)
    adapter = save_adapter(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    expected = merged_by_peft(base, adapter).eval()
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(merge(base, adapter, tmp_path / "merged")).eval()(IDS).logits
        torch.testing.assert_close(logits, expected(IDS).logits, atol=1e-5, rtol=1e-4)


def test_a_tied_weight_trained_under_one_name_alone_is_refused(tmp_path, tokenizer):
    base = save_base(tmp_path / "base", tokenizer, tie_word_embeddings=True)
    adapter = save_adapter(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"has one of lm_head\.weight and model\.embed_tokens\.weight"):
        merge(base, adapter, tmp_path / "merged")


def test_tied_embeddings_named_by_their_path_are_merged_as_trained(tmp_path, tokenizer):
    base = save_base(tmp_path / "base", tokenizer, tie_word_embeddings=True)
    adapter = save_adapter(base, tmp_path / "adapter", modules_to_save=["model.embed_tokens"])
    trained = PeftModel.from_pretrained(
        load_model(base, device=CPU, extension=RopeExtension(target_context=128)), adapter
    ).eval()
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(merge(base, adapter, tmp_path / "merged")).eval()(IDS).logits
        torch.testing.assert_close(logits, trained(IDS).logits, atol=1e-5, rtol=1e-4)


# --- checkpoints -----------------------------------------------------------------------------------------------------------


def test_many_small_shards_are_a_checkpoint_of_transformers(model_folder, model, tmp_path):
    weights = load_file(f"{model_folder}/model.safetensors")
    (tmp_path / "out").mkdir()
    write_weights(tmp_path / "out", iter(weights.items()), max_bytes=20_000)
    model.config.save_pretrained(tmp_path / "out")
    files = weight_files(tmp_path / "out")
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    largest = max(weight.nbytes for weight in weights.values())
    assert all(sum(weight.nbytes for weight in load_file(file).values()) <= max(20_000, largest) for file in files)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in weights.values())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())
    assert not list((tmp_path / "out").glob("shard-*"))


@pytest.mark.parametrize("form", ["single", "sharded", "pytorch_model.bin"])
def test_one_tensor_at_a_time_is_in_memory(model_folder, form):
    rewrite(model_folder, form)
    alive, most = weakref.WeakSet(), 0
    for _, weight in read_weights(Path(model_folder)):
        alive.add(weight)
        most = max(most, len(alive))
        del weight
    if form != "pytorch_model.bin":  # mapped into memory, not read
        assert most == 1
    weights = dict(read_weights(Path(model_folder)))
    assert len(weights) == 21


def test_no_more_than_a_shard_waits_to_be_written(tmp_path):
    alive = weakref.WeakSet()

    def weights():
        for number in range(40):
            weight = torch.full((1000,), float(number))  # 4000 bytes
            alive.add(weight)
            yield str(number), weight
            del weight
            assert len(alive) <= 5

    write_weights(tmp_path, weights(), max_bytes=16_000)
    assert len(weight_files(tmp_path)) == 10


def test_a_folder_without_weights_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"holds no weights; model.safetensors or pytorch_model.bin is missing"):
        list(read_weights(tmp_path))


# --- NF4 -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("settings", [{}, *VARIANTS], ids=["lora", "dora", "rslora"])
def test_merged_into_the_round_trip_it_is_the_adapter_on_the_4_bit_base(tmp_path, tokenizer, monkeypatch, tied, settings):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)  # it would compute in bfloat16 in evaluation
    base = save_base(tmp_path / "base", tokenizer, hidden_size=64, tie_word_embeddings=tied)
    adapter = save_adapter(base, tmp_path / "adapter", **settings)
    trained = PeftModel.from_pretrained(
        load_model(base, device=CPU, precision="nf4", extension=RopeExtension(target_context=128)), adapter
    ).eval()
    logits = {}
    for from_nf4 in (True, False):
        folder = merge(base, adapter, tmp_path / f"merged-{from_nf4}", from_nf4=from_nf4)
        with torch.no_grad():
            logits[from_nf4] = AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits
    with torch.no_grad():
        expected = trained(IDS).logits
    torch.testing.assert_close(logits[True], expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits[False], expected, atol=1e-2)


# --- errors ----------------------------------------------------------------------------------------------------------------


def test_an_adapter_of_another_base_is_refused_with_the_weight_that_is_missing(tmp_path, tokenizer):
    deep = save_base(tmp_path / "deep", tokenizer, num_hidden_layers=3)
    adapter = save_adapter(deep, tmp_path / "adapter")
    base = save_base(tmp_path / "base", tokenizer)
    with pytest.raises(ValueError, match=r"has no weight model\.layers\.2\.mlp\.down_proj\.weight, .*another base model\?"):
        merge(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize("special", [{"bias": "all"}, {"rank_pattern": {"q_proj": 2}}])
def test_an_adapter_of_another_kind_is_refused(model, tmp_path, special):
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], **special)).save_pretrained(tmp_path / "adapter")
    found = next(key for key in special)
    with pytest.raises(ValueError, match=f"only LoRA, rsLoRA and DoRA are merged here, found {found}"):
        Adapter(str(tmp_path / "adapter"))


# --- the arithmetic --------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    inputs=st.integers(1, 20),
    outputs=st.integers(1, 20),
    rank=st.integers(1, 8),
    alpha=st.integers(1, 64),
    variants=st.fixed_dictionaries({"use_rslora": st.booleans(), "use_dora": st.booleans()}),
    seed=st.integers(0, 9),
)
def test_an_adapter_is_applied_as_peft_does(tmp_path, inputs, outputs, rank, alpha, variants, seed):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(OrderedDict(layer=torch.nn.Linear(inputs, outputs, bias=False)))
    weight = model.layer.weight.detach().clone()
    adapted = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=["layer"], init_lora_weights=False, **variants)
    )
    for name, part in adapted.named_parameters():
        if "magnitude" in name:
            torch.nn.init.uniform_(part, 0.5, 2)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted.merge_and_unload().layer.weight
    adapter = Adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(adapter.apply("layer.weight", weight), expected)
    assert adapter.apply("other.weight", weight) is weight
