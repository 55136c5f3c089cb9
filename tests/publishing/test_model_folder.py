import json
from pathlib import Path

import pytest
import torch
from conftest import CHATML, train_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from longqlora.data.chat_template import CHAT_TEMPLATE, plain_template, with_chat_template
from longqlora.data.tokenizers import load_tokenizer
from longqlora.modeling.generation_settings import stop_tokens
from longqlora.publishing.model_card import Stage
from longqlora.publishing.model_folder import generation_config, link_or_copy, publish_model, save_tokenizer
from longqlora.training.pretraining import train_tokenizer


@pytest.fixture
def publish(model_folder, corpus, tmp_path):
    """Train all weights for a step and publish them."""

    def run(tokenizer: str = model_folder, name: str = "published", earlier: str | None = None, **settings) -> Path:
        card = train_tiny(model_folder, corpus, tmp_path / "weights", method="full", steps=1)
        card["settings"] |= settings
        places = {"weights": str(tmp_path / "weights"), "output": str(tmp_path / name)}
        before = [Stage("Before", card | {"settings": card["settings"] | {"data": earlier}})] if earlier else []
        stages = [*before, Stage("My model", card)]
        publish_model(**places, base_model=model_folder, tokenizer=tokenizer, stages=stages)
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
    generation_config(model_folder, 128, [2]).save_pretrained(tmp_path / "published")
    saved = GenerationConfig.from_pretrained(tmp_path / "published")
    assert (saved.do_sample, saved.temperature, saved.top_p, saved.max_length) == (True, 0.9, 0.6, 128)
    assert (saved.bos_token_id, saved.eos_token_id, saved.pad_token_id) == (1, 2, 0)


def test_greedy_generation_settings_stay(model_folder):
    (Path(model_folder) / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    found = generation_config(model_folder, 128, [2])
    assert (found.do_sample or False, found.eos_token_id) == (False, 2)


def test_generation_settings_that_transformers_warns_of_do_not_stop_the_publishing(publish, model_folder):
    settings = {"top_k": 20, "min_p": 0.1, "length_penalty": 2.0, "max_length": 64}
    (Path(model_folder) / "generation_config.json").write_text(json.dumps(settings))
    published = json.loads((publish() / "generation_config.json").read_text())
    assert published.items() >= (settings | {"max_length": 128}).items()


def num_generated(folder: Path, token: int) -> int:
    """Number of tokens, at most 16, that a model generates with its own settings, if this token is always the likeliest."""

    def always(_, scores):
        return torch.full_like(scores, -1.0).index_fill(1, torch.tensor([token]), 1.0)

    model = AutoModelForCausalLM.from_pretrained(folder)
    given = torch.tensor([[5, 6]])
    return model.generate(given, max_new_tokens=16, do_sample=False, logits_processor=[always]).shape[1] - 2


@pytest.mark.parametrize(
    ("generation", "config", "stop"),
    [
        (None, {}, [2]),
        (None, {"eos_token_id": None}, [2]),
        (None, {"eos_token_id": [2, 1]}, [2, 1]),
        ("{not JSON", {}, [2]),  # transformers reads config.json then
        ({}, {"eos_token_id": 1}, [2, 1]),
        ({"eos_token_id": 1}, {}, [2, 1]),
        ({"eos_token_id": [1, 2]}, {}, [2, 1]),
        ({"eos_token_id": 7}, {}, [2]),  # an ordinary token of this tokenizer
    ],
)
def test_a_published_model_stops_at_what_was_trained_and_where_its_base_stops(publish, model_folder, generation, config, stop):
    folder = Path(model_folder)
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        text = generation if isinstance(generation, str) else json.dumps(generation)
        (folder / "generation_config.json").write_text(text)
    published = publish()
    settings = json.loads((published / "generation_config.json").read_text())
    assert settings["eos_token_id"] == (stop if len(stop) > 1 else stop[0])
    assert "_from_model_config" not in settings  # with it, transformers 4 takes the tokens of config.json
    assert [num_generated(published, token) for token in (1, 2, 7)] == [1 if token in stop else 16 for token in (1, 2, 7)]


def test_a_chat_model_stops_at_the_token_that_ends_its_answers(publish, model_folder):
    chat = AutoTokenizer.from_pretrained(model_folder)
    chat.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    chat.chat_template = CHATML
    chat.save_pretrained(model_folder)
    published = publish(data="sft")
    end = chat.convert_tokens_to_ids("<|im_end|>")
    assert GenerationConfig.from_pretrained(published).eos_token_id == [end, 2]
    assert AutoTokenizer.from_pretrained(published).chat_template == plain_template(CHATML)
    assert stop_tokens(model_folder, with_chat_template(load_tokenizer(model_folder))) == [end, 2]


def test_the_chat_template_goes_with_a_chat_model_alone(publish, tmp_path):
    chat = AutoTokenizer.from_pretrained(publish(name="chat", data="sft"))
    plain = AutoTokenizer.from_pretrained(publish(name="plain"))
    assert chat.model_max_length == plain.model_max_length == 128
    assert plain.chat_template is None
    prompt = chat.apply_chat_template([{"role": "user", "content": "Hi!"}], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("to the user's questions. USER: Hi! ASSISTANT:")


def test_a_chat_model_that_is_trained_further_on_texts_keeps_the_chat_template(publish):
    assert (publish(earlier="sft") / "chat_template.jinja").read_text() == plain_template(CHAT_TEMPLATE)


def test_templates_by_name_are_published_in_standard_jinja(model_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = {"default": CHATML, "tools": "{{ tools }}"}
    save_tokenizer(tokenizer, str(tmp_path / "out"), 128)
    published = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert published == {"default": plain_template(CHATML), "tools": "{{ tools }}"}
