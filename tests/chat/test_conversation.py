"""A conversation gives the same answers with its cache as without, and reads only what is new."""

import json

import pytest
import torch
from chat_models import save_chat_model
from conftest import LONGLORA, train_tiny

from longqlora.chat.chat_model import find_chat_model
from longqlora.chat.conversation import Conversation
from longqlora.chat.documents import Document, chat_prompt
from longqlora.chat.generation import Progress, TextGenerator

DYNAMIC = {
    "rope_parameters": {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 10000.0},
    "max_position_embeddings": 64,
}


@pytest.fixture
def start(tmp_path, tokenizer):
    def make(text="", max_new_tokens=8, **fields) -> Conversation:
        chat_model = find_chat_model(save_chat_model(tmp_path / "model", tokenizer, **fields))
        chat_model.load()
        return Conversation(TextGenerator(chat_model, max_new_tokens), [Document("text", text)] if text else [])

    return make


def ask(conversation: Conversation, question: str) -> str:
    return "".join(piece for piece in conversation.ask(question) if isinstance(piece, str))


def without_cache(conversation: Conversation, question: str) -> str:
    """transformers' own greedy answer, from the whole conversation."""
    chat_model = conversation.generator.chat_model
    messages = [*conversation.messages, {"role": "user", "content": question}]
    prompt = torch.tensor([chat_prompt(chat_model.tokenizer, conversation.documents, messages)])
    rotary = chat_model.model.base_model.rotary_emb
    rotary.max_seq_len_cached = rotary.original_max_seq_len
    stop = chat_model.settings.eos_token_id
    ids = chat_model.model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=stop, pad_token_id=stop[0])
    return chat_model.tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True).lstrip()


@pytest.mark.parametrize("fields", [{}, DYNAMIC], ids=["plain", "dynamic"])
def test_answers_are_those_without_a_cache(start, fields):
    conversation = start("A text about a house. " * 3, **fields)
    for question in ("Where?", "Who is in the house?", "And why?", "When?"):
        expected = without_cache(conversation, question)
        assert ask(conversation, question) == expected
    assert len(conversation.messages) == 8


def test_a_document_is_read_once_also_by_a_new_conversation(start):
    conversation = start("A text about a house. " * 20)
    ask(conversation, "Where?")
    first = conversation.generator.statistics
    assert first.cached == 0
    ask(conversation, "Who?")
    second = conversation.generator.statistics
    assert second.cached >= first.prompt
    assert second.prompt - second.cached < first.prompt / 2
    conversation.messages = []
    ask(conversation, "When?")
    assert first.prompt / 2 < conversation.generator.statistics.cached < first.prompt


def test_beyond_its_original_context_a_dynamic_model_reads_each_prompt_anew(start):
    conversation = start("A text about a house. " * 10, **DYNAMIC)
    ask(conversation, "Where?")
    ask(conversation, "Who?")
    assert conversation.generator.statistics.cached == 0


def test_an_input_beyond_the_context_says_by_how_much_and_the_conversation_goes_on(start):
    conversation = start()
    ask(conversation, "Who?")
    tokenizer = conversation.generator.chat_model.tokenizer
    messages = [*conversation.messages, {"role": "user", "content": "word " * 600}]
    number = len(chat_prompt(tokenizer, [], messages))
    with pytest.raises(ValueError, match=f"{number:,} tokens and one for the answer are {number - 511:,} more .* of 512"):
        ask(conversation, "word " * 600)
    assert len(conversation.messages) == 2
    ask(conversation, "Who?")
    assert len(conversation.messages) == 4


def test_an_answer_ends_with_the_context(start):
    conversation = start("A text. ", max_new_tokens=10_000, eos_token_id=None)
    conversation.generator.chat_model.settings.eos_token_id = [511]
    ask(conversation, "Who?")
    statistics = conversation.generator.statistics
    assert (statistics.prompt + statistics.generated, statistics.end) == (512, "context")


def test_a_stopped_answer_stays_as_far_as_it_came(start):
    conversation = start("A text. ", max_new_tokens=400)
    conversation.generator.chat_model.settings.eos_token_id = [511]
    answer = conversation.ask("Who?")
    shown = ""
    while len(shown) < 5:
        piece = next(answer)
        shown += "" if isinstance(piece, Progress) else piece
    answer.close()
    assert not conversation.generator.is_working()
    assert conversation.messages[-1] == {"role": "assistant", "content": shown.strip()}
    assert conversation.generator.statistics.end == "stopped"
    assert conversation.generator.statistics.generated < 300
    expected = without_cache(conversation, "Why?")
    conversation.generator.max_new_tokens = 8
    assert ask(conversation, "Why?") == expected


def test_a_question_that_is_stopped_while_it_is_read_is_no_part_of_the_conversation(start):
    conversation = start("A text about a house. " * 20)
    answer = conversation.ask("Who?")
    assert isinstance(next(answer), Progress)
    answer.close()
    assert conversation.messages == []


def test_an_error_of_the_model_is_raised_and_the_cache_begins_anew(start, monkeypatch):
    conversation = start("A text. ")
    ask(conversation, "Who?")
    generator = conversation.generator

    def fail(*_, **__):
        raise RuntimeError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(type(generator.chat_model.model), "forward", fail)
        with pytest.raises(MemoryError, match="--4bit"):
            ask(conversation, "Why?")
    assert generator.cached == []
    assert ask(conversation, "Why?") is not None


def test_an_adapter_extends_the_context_as_its_training_did(corpus, tokenizer, tmp_path):
    base = save_chat_model(tmp_path / "base", tokenizer, max_position_embeddings=64)
    adapter = tmp_path / "results/adapters/system"
    card = train_tiny(base, corpus, adapter, steps=1, **LONGLORA)
    card_file = tmp_path / "results/training/system.json"
    card_file.parent.mkdir()
    card_file.write_text(json.dumps(card), encoding="utf-8")
    chat_model = find_chat_model(base, adapter=str(adapter))
    assert chat_model.context == 128
    chat_model.load()
    assert chat_model.model.config.rope_parameters["factor"] == 2
    assert any("lora" in name for name, _ in chat_model.model.named_parameters())
