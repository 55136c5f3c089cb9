import json
from pathlib import Path

import pytest
import torch
from conftest import CHATML, train_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from longqlora.data.chat_template import CHAT_TEMPLATE, plain_template
from longqlora.publishing.model_folder import generation_config, link_or_copy, publish_model, save_tokenizer
from longqlora.training.pretraining import train_tokenizer


@pytest.fixture
def publish(model_folder, corpus, tmp_path):
    """Train all weights for a step and publish them."""

    def run(tokenizer: str = model_folder, name: str = "published", **settings) -> Path:
        card = train_tiny(model_folder, corpus, tmp_path / "weights", method="full", steps=1)
        card["settings"] |= settings
        places = {"weights": str(tmp_path / "weights"), "output": str(tmp_path / name)}
        publish_model(**places, base_model=model_folder, tokenizer=tokenizer, label="My model", card=card, report=None)
        return tmp_path / name

    return run


def test_a_fully_trained_model_is_published_with_all_that_belongs_to_it(publish, model_folder, tmp_path):
    GenerationConfig(max_length=64, bos_token_id=1, eos_token_id=2).save_pretrained(model_folder)
    folder = publish()
    files = {path.name for path in folder.iterdir()}
    assert files == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    assert GenerationConfig.from_pretrained(folder).max_length == 128
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 128
    assert "# My model" in (folder / "README.md").read_text()
    model, trained = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "weights"))
    assert model.config.max_position_embeddings == 128
    assert all(torch.equal(weight, trained.state_dict()[name]) for name, weight in model.state_dict().items())


def test_published_weights_take_no_further_space_and_outlive_what_they_were_made_from(publish, tmp_path):
    folder = publish()
    assert (folder / "model.safetensors").stat().st_ino == (tmp_path / "weights" / "model.safetensors").stat().st_ino
    (tmp_path / "weights" / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(folder)


def test_where_a_file_system_has_no_links_weights_are_copied(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("Operation not permitted")

    (tmp_path / "weights").write_bytes(b"weights")
    monkeypatch.setattr("os.link", refuse)
    link_or_copy(tmp_path / "weights", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"weights"


def test_the_tokenizer_that_was_trained_with_is_published_not_the_bases(publish, texts, tmp_path):
    train_tokenizer(texts, vocab_size=300).save_pretrained(tmp_path / "other")
    assert len(AutoTokenizer.from_pretrained(publish(tokenizer=str(tmp_path / "other")))) == 300


def test_a_model_trained_on_instructions_has_the_chat_template(publish):
    folder = publish(data="sft")
    assert (folder / "chat_template.jinja").read_text() == plain_template(CHAT_TEMPLATE)
    assert "Its prompt is the tokenizer's chat template" in (folder / "README.md").read_text()


def test_generation_settings_that_transformers_refuses_to_save_are_mended(model_folder, tmp_path):
    """Vicuna's: a temperature without do_sample, and a maximal length that is the old context."""
    vicuna = {"temperature": 0.9, "top_p": 0.6, "max_length": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (Path(model_folder) / "generation_config.json").write_text(json.dumps(vicuna))
    generation_config(model_folder, 128).save_pretrained(tmp_path / "published")
    saved = GenerationConfig.from_pretrained(tmp_path / "published")
    assert (saved.do_sample, saved.temperature, saved.top_p, saved.max_length) == (True, 0.9, 0.6, 128)
    assert (saved.bos_token_id, saved.eos_token_id, saved.pad_token_id) == (1, 2, 0)


def test_greedy_generation_settings_stay_and_missing_ones_are_no_error(model_folder, tmp_path):
    (Path(model_folder) / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    found = generation_config(model_folder, 128)
    assert (found.do_sample or False, found.eos_token_id) == (False, 2)
    (Path(model_folder) / "generation_config.json").unlink()
    generation_config(model_folder, 128).save_pretrained(tmp_path / "out")


def test_the_chat_template_goes_with_a_chat_model_alone(publish, tmp_path):
    chat = AutoTokenizer.from_pretrained(publish(name="chat", data="sft"))
    plain = AutoTokenizer.from_pretrained(publish(name="plain"))
    assert chat.model_max_length == plain.model_max_length == 128
    assert plain.chat_template is None
    prompt = chat.apply_chat_template([{"role": "user", "content": "Hi!"}], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("to the user's questions. USER: Hi! ASSISTANT:")


def test_templates_by_name_are_published_in_standard_jinja(model_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = {"default": CHATML, "tools": "{{ tools }}"}
    save_tokenizer(tokenizer, str(tmp_path / "out"), 128)
    published = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert published == {"default": plain_template(CHATML), "tools": "{{ tools }}"}
