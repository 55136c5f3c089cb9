import json
import random
import re
import tracemalloc
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import pandas
import pyarrow.parquet
import pytest

from longqlora.config.settings import SftSource
from longqlora.data.chat_template import tokenize_conversation, with_chat_template
from longqlora.data.decontamination import EvaluationNgrams, index_evaluation_sets
from longqlora.data.instruction_set import InstructionPass, SftSampleSettings, build_sft_set, tokenize_sft
from longqlora.data.packing import PackedRecords, read_tokenized_records


@pytest.fixture(scope="module")
def chat(tokenizer):
    return with_chat_template(deepcopy(tokenizer))


@pytest.fixture
def evaluation_ngrams(tmp_path) -> EvaluationNgrams:
    texts = ["the quick brown fox jumps over the lazy dog", "a b c d e"]
    index_evaluation_sets({"proof": texts}, 5, str(tmp_path / "ngrams.parquet"))
    return EvaluationNgrams(str(tmp_path / "ngrams.parquet"), threshold=1)


@pytest.fixture
def build(tmp_path, chat, evaluation_ngrams):
    """Build a set of sources; return the card, the records and the report on removed ones."""

    usual = SftSampleSettings(num_records=40, max_tokens=200, seed=1, allow_fewer=False, max_malformed_share=0.0)

    def run(sources: list[SftSource], **changes):
        output, removed = str(tmp_path / "sft.parquet"), str(tmp_path / "removed.csv")
        card = build_sft_set(
            sources=sources,
            settings=replace(usual, **changes),
            tokenizer=chat,
            ngrams=evaluation_ngrams,
            output=output,
            removed=removed,
        )
        return card, pyarrow.parquet.read_table(output).to_pylist(), pandas.read_csv(removed)

    return run


def records_of(name: str, count: int = 40) -> list[dict]:
    return [{"input": f"{name} question {i}", "output": f"answer {i}"} for i in range(count)]


def source(tmp_path, name: str, share: float, records: list[dict], num_files: int = 1, schema="input_output") -> SftSource:
    """A source with its records in some files."""
    paths = []
    for number in range(num_files):
        path = tmp_path / f"{name}-{number}-of-{num_files}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records[number::num_files]))
        paths.append(str(path))
    return SftSource(name=name, schema=schema, share=share, paths=paths)


def ids(rows: list[dict]) -> set[str]:
    return {row["id"] for row in rows}


def test_the_card_of_a_source_holds_one_record_in_memory_at_a_time(tmp_path, evaluation_ngrams):
    settings = SftSampleSettings(num_records=200, max_tokens=200, seed=1, allow_fewer=False, max_malformed_share=0.0)
    reading = InstructionPass(source(tmp_path, "a", 1.0, []), 200, settings, evaluation_ngrams, tmp_path)
    size = 50_000
    for number in range(200):
        value = {"num_tokens": number, "shortened": number < 50, "messages": [{"role": "user", "content": "x" * size}]}
        reading.kept.add(number, str(number), value)
    tracemalloc.start()
    card = reading.card()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (card["taken"], card["shortened"], card["tokens"]) == (200, 50, sum(range(200)))
    assert peak < 20 * size


def test_shares_are_met_and_the_set_is_reproducible(tmp_path, build):
    sources = [source(tmp_path, "a", 0.75, records_of("a")), source(tmp_path, "b", 0.25, records_of("b"))]
    card, rows, removed = build(sources)
    assert Counter(row["source"] for row in rows) == {"a": 30, "b": 10}
    assert card["records"] == len(rows) == len(ids(rows)) == 40
    assert card["tokens"] == sum(row["num_tokens"] for row in rows)
    assert card["sources"]["b"] == {
        "read": 40, "malformed": 0, "without an answer": 0, "duplicate": 0, "too long": 0, "contaminated": 0, "wanted": 10,
        "taken": 10, "shortened": 0, "tokens": sum(row["num_tokens"] for row in rows if row["source"] == "b"),
    }  # fmt: skip
    assert removed.empty
    stored = (tmp_path / "sft.parquet").read_bytes()
    assert build(sources)[:2] == (card, rows)
    assert (tmp_path / "sft.parquet").read_bytes() == stored
    other = build(sources, seed=2)[1]
    assert ids(other) != ids(rows)
    assert [row["source"] for row in rows] != sorted(row["source"] for row in rows)  # sources are mixed


def test_every_part_of_the_set_has_the_sources_in_their_shares(tmp_path, build):
    """Also if the sources differ in size: the last records are held out, and must be a sample of all."""
    sources = [source(tmp_path, "a", 0.75, records_of("a", 31)), source(tmp_path, "b", 0.25, records_of("b", 300))]
    _, rows, _ = build(sources)
    for begin in range(0, 40, 8):
        assert Counter(row["source"] for row in rows[begin : begin + 8]) == {"a": 6, "b": 2}


def test_the_set_does_not_depend_on_the_order_of_records_or_files(tmp_path, build):
    records = records_of("a", 60)
    _, expected, _ = build([source(tmp_path, "a", 1.0, records)])
    for seed, num_files in enumerate([1, 2, 7]):
        random.Random(seed).shuffle(records)
        spread = source(tmp_path, "a", 1.0, records, num_files)
        assert build([spread])[1] == expected
        assert build([spread.model_copy(update={"paths": spread.paths[::-1]})])[1] == expected
        assert build([spread.model_copy(update={"paths": [f"file://{tmp_path}/a-*-of-{num_files}.jsonl"]})])[1] == expected


def test_a_larger_set_holds_the_smaller_one(tmp_path, build):
    sources = [source(tmp_path, "a", 0.7, records_of("a")), source(tmp_path, "b", 0.3, records_of("b"))]
    sets = [ids(build(sources, num_records=number)[1]) for number in (1, 2, 5, 17, 40, 56)]
    assert [len(found) for found in sets] == [1, 2, 5, 17, 40, 56]
    assert all(smaller < larger for smaller, larger in pairwise(sets))


def test_equal_records_are_taken_once(tmp_path, build):
    records = records_of("a", 40)
    card, rows, _ = build([source(tmp_path, "a", 1.0, records + records[:15] + records[:5], num_files=3)])
    assert len(ids(rows)) == len(rows) == 40
    assert card["sources"]["a"]["duplicate"] == 20
    with pytest.raises(ValueError, match="a has 39 of 40"):
        build([source(tmp_path, "a", 1.0, [*records[:39], records[0]])])


def test_a_quota_that_cannot_be_met_says_which_source_has_how_many(tmp_path, build):
    sources = [source(tmp_path, "a", 0.75, records_of("a")), source(tmp_path, "b", 0.25, records_of("b"))]
    message = r"sft.num_records asks for 100 records of at most 200 tokens, but a has 40 of 75 \(80 read\); sft.allow_fewer"
    with pytest.raises(ValueError, match=message):
        build(sources, num_records=100)
    with pytest.raises(ValueError, match=r"of at most 5 tokens, but a has 0 of 30; b has 0 of 10 \(80 read, 80 too long\)"):
        build(sources, max_tokens=5)
    card, rows, _ = build(sources, num_records=100, allow_fewer=True)
    assert Counter(row["source"] for row in rows) == {"a": 40, "b": 25}
    assert (card["records"], card["sources"]["a"]["wanted"], card["sources"]["a"]["taken"]) == (65, 75, 40)


def test_a_set_without_a_record_is_an_error_though_fewer_will_do(tmp_path, build):
    """Whatever became of the records; one is enough."""
    unanswered = {"document": "Rome.", "question": "Where?", "short_answers": [], "long_answer": ""}
    copy = {"input": "Where?", "output": "The quick brown fox jumps"}
    cases = {
        "too long": (r"\(5 read, 5 too long\)", "input_output", records_of("a", 5), 5),
        "without an answer": (r"\(3 read, 3 without an answer\)", "natural_questions", [unanswered] * 3, 200),
        "contaminated": (r"\(2 read, 1 duplicate, 1 contaminated\)", "input_output", [copy, copy], 200),
        "empty": (r"\(the files have no record\)", "input_output", [], 200),
    }
    for name, (found, schema, records, max_tokens) in cases.items():
        message = rf"but {name} has 0 of 40 {found}; sft.allow_fewer: true accepts a smaller set, but not an empty one"
        with pytest.raises(ValueError, match=message):
            build([source(tmp_path, name, 1.0, records, schema=schema)], max_tokens=max_tokens, allow_fewer=True)
    sources = [source(tmp_path, "a", 0.5, records_of("a", 1)), source(tmp_path, "b", 0.5, [])]
    assert len(build(sources, allow_fewer=True)[1]) == 1


def test_contaminated_records_are_removed_replaced_and_reported(tmp_path, build):
    copies = [
        {"input": f"Go on, {number}: The quick brown", "output": f"Fox jumps over the lazy dog {number}"}
        for number in range(10)
    ]
    card, rows, removed = build([source(tmp_path, "a", 1.0, records_of("a") + copies)])
    assert len(rows) == 40
    assert not any("lazy dog" in row["messages"][1]["content"] for row in rows)
    assert card["sources"]["a"]["contaminated"] == len(removed) == 10
    assert set(removed["evaluation_set"]) == {"proof"}
    assert set(removed["source"]) == {"a"}
    assert set(removed["example"]) == {"the quick brown fox jumps"}
    assert not ids(rows) & set(removed["id"])
    card, rows, removed = build([source(tmp_path, "a", 1.0, records_of("a") + copies)], num_records=10)
    assert card["sources"]["a"]["contaminated"] == len(removed) < 10  # those that would have been drawn


def talk(number: int, system: str, question: str = "What now?", answer: str = "Nothing") -> dict:
    turns = [("system", system), ("human", question), ("gpt", f"{answer} {number}")]
    return {"conversations": [{"from": who, "value": value} for who, value in turns]}


@pytest.mark.parametrize(
    "messages",
    [
        ("You know: the quick brown fox jumps", "What now?", "Nothing"),
        ("Say the quick", "brown fox jumps", "over"),  # a passage that reaches from one message into the next
        ("Be brief", "the quick brown fox", "jumps"),
    ],
    ids=["system", "system and question", "question and answer"],
)
def test_a_passage_is_found_in_every_message(tmp_path, build, messages):
    talks = [talk(number, "Be brief") for number in range(40)] + [talk(41, *messages)]
    card, _, removed = build([source(tmp_path, "talks", 1.0, talks, schema="sharegpt")])
    assert card["sources"]["talks"]["contaminated"] == len(removed) == 1
    assert removed["example"].tolist() == ["the quick brown fox jumps"]


def test_a_nul_character_is_malformed_in_every_message(tmp_path, build):
    odd = [("be\0", "?", "!"), ("be", "why\0", "!"), ("be", "why", "\0so")]
    talks = [talk(number, "Be brief") for number in range(40)] + [talk(41 + i, *messages) for i, messages in enumerate(odd)]
    card, _, _ = build([source(tmp_path, "talks", 1.0, talks, schema="sharegpt")], max_malformed_share=0.1)
    assert card["sources"]["talks"]["malformed"] == 3
    assert all(example.endswith("NUL character") for example in card["malformed"])


def test_the_finished_set_is_compared_once_more(tmp_path, build, monkeypatch):
    monkeypatch.setattr(InstructionPass, "overlap_rows", lambda *_: [])
    talks = [talk(number, "Be brief") for number in range(39)] + [talk(41, "the quick brown fox jumps")]
    message = "the instruction set: [0-9a-f]{32} shares 1 5-grams with the evaluation set 'proof', such as “the quick brown"
    with pytest.raises(ValueError, match=message):
        build([source(tmp_path, "talks", 1.0, talks, schema="sharegpt")])


def test_too_many_malformed_records_stop_the_run(tmp_path, build):
    records = [*records_of("a"), {"input": "?", "output": ""}, {"input": "nul \0", "output": "!"}]
    sources = [source(tmp_path, "a", 1.0, records)]
    path = re.escape(sources[0].paths[0])
    with pytest.raises(ValueError, match=rf"2 of 42 records are malformed \(4.76%\).*\n.*{path}, line 41: .*\n.*line 42: NUL"):
        build(sources, max_malformed_share=0.04)
    card, rows, _ = build(sources, max_malformed_share=0.05)
    assert (len(rows), card["sources"]["a"]["malformed"], card["sources"]["a"]["read"]) == (40, 2, 40)
    assert [example.partition(", ")[2][:7] for example in card["malformed"]] == ["line 41", "line 42"]


def test_records_without_an_answer_are_counted(tmp_path, build):
    answered = [{"document": "Rome.", "question": f"q{i}", "short_answers": ["a"], "long_answer": ""} for i in range(40)]
    records = [*answered, {**answered[0], "short_answers": []}]
    card, _, _ = build([source(tmp_path, "nq", 1.0, records, schema="natural_questions")])
    assert (card["sources"]["nq"]["without an answer"], card["sources"]["nq"]["read"]) == (1, 41)


def test_long_records_are_shortened_to_the_limit(tmp_path, build, chat):
    chapters = ["".join(f"Sentence {j} of chapter {i}. " for j in range(1, 2 + 2 * i)) for i in range(40)]
    records = [{"chapter": chapter, "summary_text": f"Of chapter {i}."} for i, chapter in enumerate(chapters)]
    card, rows, _ = build([source(tmp_path, "books", 1.0, records, schema="booksum")])
    assert len(rows) == 40
    assert 0 < card["sources"]["books"]["shortened"] == sum(row["shortened"] for row in rows) < 40
    for row in rows:
        question, answer = (message["content"] for message in row["messages"])
        document, below, rest = question.partition("\n\nSummarise the text above.")
        number = int(re.fullmatch(r"Of chapter (\d+)\.", answer)[1])
        assert below
        assert not rest
        assert chapters[number].startswith(document)
        assert document.endswith(f"of chapter {number}." if row["shortened"] else ". ")
        assert row["num_tokens"] == len(tokenize_conversation(chat, row["messages"])[0]) <= 200


def test_fields_that_the_schema_does_not_use_are_counted_in_the_card(tmp_path, build, caplog):
    records = [{**record, "tools": "[]" if number else "[{}]", "id": number} for number, record in enumerate(records_of("a"))]
    sources = [source(tmp_path, "a", 0.5, records), source(tmp_path, "b", 0.5, records_of("b"))]
    with caplog.at_level("INFO"):
        card, _, _ = build(sources)
    assert card["unused_fields"] == {"a": {"id": 40, "tools": 1}, "b": {}}
    assert "a: fields that are not used, and the number of records with each: id (40), tools (1)" in caplog.messages


# --- tokenize_sft ----------------------------------------------------------------------------------------------------------


def test_tokens_of_a_set_have_a_row_a_record_and_packing_loses_nothing(tmp_path, build, chat):
    talks = [
        {"conversations": [{"from": who, "value": f"{who} {i}-{j}"} for j in range(i % 3 + 1) for who in ("human", "gpt")]}
        for i in range(200)
    ]
    _, rows, _ = build([source(tmp_path, "talks", 1.0, talks, schema="sharegpt")], num_records=150)
    output = str(tmp_path / "sft.arrow")
    card = tokenize_sft(records=str(tmp_path / "sft.parquet"), tokenizer=chat, held_out=0, output=output)
    encoded = list(read_tokenized_records(output))
    expected = [
        "".join(f" {message['content']}</s>" for message in row["messages"] if message["role"] == "assistant") for row in rows
    ]
    assert len(encoded) == len(rows) == 150  # more than two batches
    for row, text, tokens in zip(rows, expected, encoded, strict=True):
        assert len(tokens["input_ids"]) == row["num_tokens"]
        assert chat.decode(tokens["labels"][tokens["labels"] != -100]) == text
    num_learned = sum(int((tokens["labels"] != -100).sum()) for tokens in encoded)
    assert card == {"records": 150, "tokens": sum(row["num_tokens"] for row in rows), "learned": num_learned}
    packed, found = PackedRecords(output, 256), []
    for window in (packed[index] for index in range(len(packed))):
        begins = (window["position_ids"] == 0).nonzero().flatten().tolist()
        for begin, end in pairwise([*begins, len(window["labels"])]):
            labels = window["labels"][begin:end]
            found.append(chat.decode(labels[labels != -100]))
    assert len(packed) < 150
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize(("number", "held_out"), [(1, 1), (3, 3), (3, 64)])
def test_a_set_that_is_held_out_as_a_whole_is_an_error_that_names_both_numbers(tmp_path, build, chat, number, held_out):
    build([source(tmp_path, "a", 1.0, records_of("a", number))], allow_fewer=True)
    files = {"records": str(tmp_path / "sft.parquet"), "output": str(tmp_path / "sft.arrow")}
    message = f"sft.held_out keeps {held_out} records from the training, and the instruction set has {number}: nothing is left"
    with pytest.raises(ValueError, match=message):
        tokenize_sft(**files, tokenizer=chat, held_out=held_out)
    assert not (tmp_path / "sft.arrow").exists()


@pytest.mark.parametrize("held_out", [0, 1, 30, 39])
def test_held_out_records_never_reach_the_tokens(tmp_path, build, chat, held_out):
    _, rows, _ = build([source(tmp_path, "a", 1.0, records_of("a"))])
    output = str(tmp_path / "sft.arrow")
    card = tokenize_sft(records=str(tmp_path / "sft.parquet"), tokenizer=chat, held_out=held_out, output=output)
    found = [chat.decode(row["input_ids"]) for row in read_tokenized_records(output)]
    assert len(found) == card["records"] == 40 - held_out
    for number, row in enumerate(rows):
        question = f" {row['messages'][0]['content']} ASSISTANT:"
        assert any(question in text for text in found) == (number < 40 - held_out)


def test_answers_that_are_only_context_are_stored_and_not_learned(tmp_path, build, chat):
    talks = [
        {"messages": [
            {"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"wrong {i}", "weight": i % 2},
            {"role": "user", "content": f"again {i}"}, {"role": "assistant", "content": f"right {i}", "weight": 1},
        ]}
        for i in range(40)
    ]  # fmt: skip
    _, rows, _ = build([source(tmp_path, "talks", 1.0, talks, schema="messages")])
    output = str(tmp_path / "sft.arrow")
    tokenize_sft(records=str(tmp_path / "sft.parquet"), tokenizer=chat, held_out=0, output=output)
    learned = [chat.decode(row["labels"][row["labels"] != -100]) for row in read_tokenized_records(output)]
    numbers = [int(row["messages"][0]["content"].removeprefix("question ")) for row in rows]
    assert learned == [f" wrong {i}</s> right {i}</s>" if i % 2 else f" right {i}</s>" for i in numbers]
