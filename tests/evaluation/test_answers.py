import pytest
from conftest import tiny_llama
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from longqlora.data.chat_template import with_chat_template
from longqlora.data.instruction_set import RECORDS
from longqlora.data.readers import write_parquet
from longqlora.evaluation.answers import SHOWN_CHARACTERS, answer, answer_held_out, render_answers, shorten_middle


def record(number: int, turns: int = 1) -> dict:
    roles = [(role, f"{role} {number}-{turn}") for turn in range(turns) for role in ("user", "assistant")]
    messages = [{"role": role, "content": text} for role, text in roles]
    return {"source": f"source {number}", "id": str(number), "num_tokens": 9, "shortened": False, "messages": messages}


@pytest.fixture
def chat_folder(tmp_path, tokenizer) -> str:
    folder = tmp_path / "model"
    tiny_llama(max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with_chat_template(AutoTokenizer.from_pretrained(folder)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("held_out", [0, 3, 20])
def test_the_last_records_are_answered_up_to_their_last_question(tmp_path, chat_folder, monkeypatch, held_out):
    monkeypatch.setattr("longqlora.evaluation.answers.MAX_NEW_TOKENS", 4)
    write_parquet(str(tmp_path / "sft.parquet"), RECORDS, [record(number, 1 + number % 2) for number in range(10)])
    rows = answer_held_out(model_path=chat_folder, records=str(tmp_path / "sft.parquet"), held_out=held_out, device="cpu")
    expected = [record(number, 1 + number % 2) for number in range(10)][10 - min(held_out, 10) :]
    assert [row["source"] for row in rows] == [row["source"] for row in expected]
    assert [row["messages"] for row in rows] == [row["messages"][:-1] for row in expected]
    assert [row["reference"] for row in rows] == [row["messages"][-1]["content"] for row in expected]
    assert all(isinstance(row["answer"], str) for row in rows)
    assert render_answers("chat", rows).count("**Answer**") == len(rows)


def test_an_answer_is_the_most_likely_continuation_of_the_prompt(tokenizer):
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    chat = with_chat_template(PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **tokens))
    model = tiny_llama(max_position_embeddings=512)
    model.generation_config.update(do_sample=True, temperature=5.0)  # the generation settings of the base are ignored
    messages = record(1)["messages"][:-1]
    first, again = (answer(model, chat, messages) for _ in range(2))
    assert first == again
    ids = chat.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")["input_ids"]
    most_likely = model(ids).logits[0, -1].argmax()
    assert first.startswith(chat.decode(most_likely).strip())


def test_long_questions_are_shortened_in_their_middle_for_reading():
    text = "a" * SHOWN_CHARACTERS
    assert shorten_middle(text) == text
    shown = shorten_middle("begin" + text + "end")
    assert shown.startswith("begin")
    assert shown.endswith("end")
    assert "\n[… 8 characters …]\n" in shown


def test_markup_in_an_answer_stays_text():
    row = {"source": "s", "messages": [{"role": "user", "content": "# no heading\n```"}], "reference": "r", "answer": ""}
    text = render_answers("chat", [row])
    assert "\n    # no heading\n    ```" in text
    assert "\n    (nothing)" in text
