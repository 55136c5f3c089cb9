"""Which files of a model's folder count, and that they are those that transformers reads."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import save_base, tiny_llama
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from longqlora.modeling.model_files import (
    check_safetensors,
    lacks_end_token,
    largest_text_token,
    model_files,
    original_of,
    tokenizer_files,
    weight_files,
)
from longqlora.publishing.weights import read_weights


def save_other_shards(folder: Path, number: int = 2) -> None:
    """Shards of another model with their index, as a converted checkpoint leaves them behind."""
    torch.manual_seed(9)
    weights = {name: torch.randn_like(weight) for name, weight in tiny_llama().state_dict().items()}
    names = [f"model-{part + 1:05}-of-{number:05}.safetensors" for part in range(number)]
    weight_map = {name: names[index % number] for index, name in enumerate(weights)}
    for file in names:
        save_file({name: weights[name] for name in weights if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("single", [True, False], ids=["a stale index beside a file", "shards alone"])
def test_weights_are_read_from_the_files_that_transformers_reads(model_folder, single):
    folder = Path(model_folder)
    save_other_shards(folder)
    if not single:
        (folder / "model.safetensors").unlink()
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    found = dict(read_weights(folder))
    assert found.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())
    names = [file.name for file in weight_files(folder)]
    assert names == (["model.safetensors"] if single else [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)])


def test_safetensors_go_before_bin_as_in_transformers(model_folder):
    torch.save(tiny_llama().state_dict(), Path(model_folder) / "pytorch_model.bin")
    assert [file.name for file in weight_files(Path(model_folder))] == ["model.safetensors"]
    (Path(model_folder) / "model.safetensors").unlink()
    assert [file.name for file in weight_files(Path(model_folder))] == ["pytorch_model.bin"]


def test_shards_that_are_missing_are_named(model_folder):
    folder = Path(model_folder)
    save_other_shards(folder, number=3)
    (folder / "model.safetensors").unlink()
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"index.json: names 3 files, but model-00002-of-00003.safetensors is missing"):
        weight_files(folder)


def test_a_damaged_file_of_weights_is_told_by_its_header(model_folder):
    file = Path(model_folder) / "model.safetensors"
    check_safetensors(file)
    whole = file.read_bytes()
    for content, message in (
        (
            whole[:-1],
            rf"model\.safetensors: has {len(whole) - 1:,} bytes, but its header describes {len(whole):,}; it is",
        ),
        (whole + b"x", r"bytes, but its header describes"),
        (whole[:100], r"has no header of safetensors; it is damaged: get it again"),
        (b"", r"has no header of safetensors"),
        (b"\x23" + bytes(7) + b'{"a": {"data_offsets": ["0", "4"]}} ', r"has no header of safetensors"),
        (b"<!doctype html><html>an error page of a server</html>", r"has no header of safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", r"it is a pointer of Git LFS: .* git lfs pull"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            check_safetensors(file)


def test_the_largest_token_of_a_text_is_that_of_the_tokenizer_without_its_special_tokens(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    assert largest_text_token(file) == len(tokenizer) - 1
    content = json.loads(file.read_text(encoding="utf-8"))
    pad, word = ({"id": 600 + special, "content": f"<{special}>", "special": bool(special)} for special in (1, 0))
    for added, largest in (([pad], 511), ([pad, word], 600)):
        file.write_text(json.dumps(content | {"added_tokens": [*content["added_tokens"], *added]}))
        assert largest_text_token(file) == largest
    file.write_text(json.dumps({"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}}))
    assert largest_text_token(file) == 1
    for content in (
        "",
        "{",
        "[]",
        '{"model": {}}',
        '{"model": {"vocab": {"a": "0"}}}',
        "version https://git-lfs.github.com/spec/v1",
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json: is not a tokenizer"):
            largest_text_token(file)


def test_the_end_token_is_missed_where_no_class_has_one_of_its_own(tmp_path):
    file = tmp_path / "tokenizer_config.json"
    assert not lacks_end_token(tmp_path)
    for settings, lacks in (
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, True),
        ({"tokenizer_class": "TokenizersBackend", "eos_token": None}, True),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": {"content": "</s>"}}, False),
        ({"tokenizer_class": "LlamaTokenizer"}, False),
    ):
        file.write_text(json.dumps(settings))
        assert lacks_end_token(tmp_path) is lacks


@pytest.mark.parametrize(
    ("card", "original"),
    [
        ("---\nbase_model: meta-llama/Llama-2-7b-hf\nmodel_type: llama\n---\n", "meta-llama/Llama-2-7b-hf"),
        ("---\nbase_model:\n- owner/name\n---\n", "owner/name"),
        ('---\nbase_model: "owner/name"\n---\n', "owner/name"),
        ("# A model\n", None),
    ],
)
def test_a_model_card_names_what_a_model_was_made_from(tmp_path, card, original):
    assert original_of(tmp_path) is None
    (tmp_path / "README.md").write_text(card)
    assert original_of(tmp_path) == original


def test_what_counts_of_a_folder_is_what_decides_its_numbers(tmp_path, tokenizer):
    folder = Path(save_base(tmp_path / "base", tokenizer))
    for stray in (".DS_Store", "README.md", "notes.txt", "chat_template.jinja"):
        (folder / stray).write_text("x")
    shutil.copy(folder / "config.json", folder / "config.backup.json")
    assert [file.name for file in model_files(str(folder))] == ["config.json", "model.safetensors"]
    assert {file.name for file in tokenizer_files(str(folder))} == {"tokenizer.json", "tokenizer_config.json"}
    assert "chat_template.jinja" in {file.name for file in tokenizer_files(str(folder), with_chat_template=True)}
