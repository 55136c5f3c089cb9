import json

import pyarrow.parquet
import pytest

from longqlora.instructions import ADAPTERS, as_messages, build_sft_set, read_conversations, tokenize_conversation, tokenize_sft

RECORDS = {
    "natural_questions": {
        "document": "Rome is old.",
        "question": "how old",
        "short_answers": ["old"],
        "long_answer": "Rome is old.",
    },
    "evol_instruct": {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    "booksum": {"chapter": "It was night. He slept.", "summary_text": "A man sleeps."},
    "long_alpaca": {"instruction": "Below is a paper. … What is it about?", "output": "Attention."},
    "input_output": {"input": "Say yes.", "output": "Yes."},
}


def test_every_schema_has_an_example_here():
    assert set(RECORDS) == set(ADAPTERS)


@pytest.mark.parametrize("schema", RECORDS)
def test_an_adapter_keeps_question_document_and_answer(tmp_path, schema):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(RECORDS[schema]) + "\n")
    ((question, answer),) = next(read_conversations(str(path), schema))
    everything = question + answer
    values = [value for value in RECORDS[schema].values() if isinstance(value, str)]
    assert all(value in everything for value in values)


def test_a_long_answer_serves_where_there_is_no_short_one():
    record = {**RECORDS["natural_questions"], "short_answers": []}
    assert ADAPTERS["natural_questions"](record)[0][1] == "Rome is old."


def test_a_record_of_another_schema_is_an_error_that_shows_it(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"prompt": "?", "completion": "!"}) + "\n")
    with pytest.raises(ValueError, match=r"record 1: not a record of schema 'booksum' .* fields are prompt, completion"):
        list(read_conversations(str(path), "booksum"))
    path.write_text(json.dumps({"input": "?", "output": " "}) + "\n")
    with pytest.raises(ValueError, match="empty question or answer"):
        list(read_conversations(str(path), "input_output"))


def test_exactly_the_answers_and_their_ends_are_learned(tokenizer):
    turns = [("What is 1 + 1?", "It is 2."), ("And 2 + 2?", "It is 4, I think.")]
    ids, labels = tokenize_conversation(tokenizer, turns)
    assert tokenizer.decode([label for label in labels if label != -100]) == " It is 2.</s> It is 4, I think.</s>"
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    text = tokenizer.decode(ids)
    assert text.startswith("A chat between a curious user and an artificial intelligence assistant.")
    assert text.endswith(" USER: What is 1 + 1? ASSISTANT: It is 2.</s> USER: And 2 + 2? ASSISTANT: It is 4, I think.</s>")


def test_messages_alternate():
    assert [message["role"] for message in as_messages([("a", "b"), ("c", "d")])] == ["user", "assistant"] * 2


def sources(tmp_path, shares, records_each=40):
    made = []
    for name, share in shares.items():
        path = tmp_path / f"{name}.jsonl"
        lines = [json.dumps({"input": f"{name} question {i}", "output": f"answer {i}"}) for i in range(records_each)]
        path.write_text("\n".join(lines))
        made.append({"name": name, "schema": "input_output", "share": share, "paths": [str(path)]})
    return made


def build(tmp_path, tokenizer, shares, num_records=40, max_tokens=200, seed=1):
    output = tmp_path / "sft.parquet"
    settings = {"num_records": num_records, "max_tokens": max_tokens, "seed": seed, "output": str(output)}
    card = build_sft_set(sources=sources(tmp_path, shares), tokenizer=tokenizer, **settings)
    return card, pyarrow.parquet.read_table(output).to_pylist()


def test_shares_are_met_and_the_set_is_reproducible(tmp_path, tokenizer):
    card, rows = build(tmp_path, tokenizer, {"a": 0.75, "b": 0.25})
    assert [row["source"] for row in rows].count("a") == 30
    assert card["sources"]["b"]["taken"] == 10
    assert build(tmp_path, tokenizer, {"a": 0.75, "b": 0.25})[1] == rows
    assert build(tmp_path, tokenizer, {"a": 0.75, "b": 0.25}, seed=2)[1] != rows


def test_a_quota_that_cannot_be_met_names_the_source(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"cannot be met: a has 40 of 75"):
        build(tmp_path, tokenizer, {"a": 0.75, "b": 0.25}, num_records=100)
    with pytest.raises(ValueError, match=r"of at most 5 tokens cannot be met: a has 0 of 30; b has 0 of 10"):
        build(tmp_path, tokenizer, {"a": 0.75, "b": 0.25}, max_tokens=5)


def test_the_tokenised_set_has_a_row_a_record(tmp_path, tokenizer):
    from longqlora.training import load_training_data

    _, rows = build(tmp_path, tokenizer, {"a": 1.0})
    tokenize_sft(records=str(tmp_path / "sft.parquet"), tokenizer=tokenizer, output=str(tmp_path / "tokens"))
    data = load_training_data(str(tmp_path / "tokens"), context_length=64)
    assert len(data) == 40
    for row, encoded in zip(rows, data, strict=True):
        learned = encoded["labels"][encoded["labels"] != -100]
        assert tokenizer.decode(learned) == f" {json.loads(row['messages'])[1]['content']}</s>"
        assert len(encoded["input_ids"]) == row["num_tokens"]
