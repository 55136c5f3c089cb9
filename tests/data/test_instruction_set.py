import json
import random
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pandas
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from longqlora.data.chat_template import CHAT_TEMPLATE, VICUNA_SYSTEM, tokenize_conversation, with_chat_template
from longqlora.data.decontamination import EvaluationNgrams, index_evaluation_sets
from longqlora.data.instruction_schemas import Conversation, about
from longqlora.data.instruction_set import build_sft_set, count_tokens, shorten, tokenize_sft
from longqlora.data.packing import PackedRecords, read_tokenized_records
from longqlora.data.sampling import apportion
from longqlora.data.token_files import tokenize_documents


def special(tokenizer) -> dict[str, str]:
    return {name: str(getattr(tokenizer, name)) for name in ("unk_token", "bos_token", "eos_token", "pad_token")}


def with_or_without_bos(tokenizer, has_bos: bool):
    """A tokenizer of the same pieces with Vicuna's template; the one that the session shares stays without."""
    tokens = special(tokenizer)
    if not has_bos:
        del tokens["bos_token"]
    return with_chat_template(PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **tokens))


@pytest.fixture(scope="module")
def chat(tokenizer):
    return with_or_without_bos(tokenizer, True)


# --- shorten ---------------------------------------------------------------------------------------------------------------

QUESTION, ANSWER = "What does it say?", "It says a lot."
WORDS = ["rome", "old", "founded", "def", "return", "naïve", "雪が", "12.5", "U.S", "x" * 20]
SENTENCES = st.lists(
    st.tuples(
        st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join),
        st.sampled_from([". ", "! ", '?" ', ".\n", "。 ", "\n\n", "...) "]),
    ).map("".join),
    min_size=1,
    max_size=30,
)


def shortened_document(conversation: Conversation) -> str:
    """What is left of a document above the question, once everything else is found to be whole."""
    (question, answer), *_ = conversation.turns
    assert answer == ANSWER
    assert question.endswith(f"\n\n{QUESTION}")
    return question.removesuffix(f"\n\n{QUESTION}")


def stretches(sentences: list[str]) -> dict[str, tuple[int, int]]:
    """All that may be left of a document: its stretches of whole sentences, and the first and last sentence of each."""
    return {
        "".join(sentences[first:last]).strip(): (first, last)
        for first in range(len(sentences))
        for last in range(first + 1, len(sentences) + 1)
    }


@settings(max_examples=150, deadline=None)
@given(sentences=SENTENCES, share=st.floats(0, 1.1), others=st.booleans())
def test_a_shortened_document_is_whole_sentences_from_its_beginning(chat, sentences, share, others):
    turns = [(QUESTION, ANSWER), *[("And more?", "No.")] * others]
    conversation = about("".join(sentences), turns)
    least, most = count_tokens(chat, about("", turns)), count_tokens(chat, conversation)
    max_tokens = round(least + share * (most - least))
    result = shorten(conversation, chat, max_tokens)
    if most <= max_tokens:
        assert result == (conversation, most)
    elif result is None:  # not even the first sentence fits, give or take the tokens at the seam
        assert count_tokens(chat, about(sentences[0], turns)) >= max_tokens - 3
    else:
        used, num_tokens = result
        assert num_tokens == count_tokens(chat, used) <= max_tokens
        assert used.turns[1:] == turns[1:]
        beginnings = ["".join(sentences[:number]) for number in range(1, len(sentences) + 1)]
        number = [beginning.strip() for beginning in beginnings].index(shortened_document(used))
        assert count_tokens(chat, about(beginnings[number + 1], turns)) >= max_tokens - 3  # no more would fit


@settings(max_examples=150, deadline=None)
@given(sentences=SENTENCES, share=st.floats(0, 1), data=st.data())
def test_the_evidence_stays_wherever_the_document_is_cut(chat, sentences, share, data):
    place = data.draw(st.integers(0, len(sentences) - 1))
    parts = [*sentences[:place], "The answer is forty-two, they say. ", *sentences[place:]]
    document = "".join(parts)
    conversation = about(document, [(QUESTION, ANSWER)], evidence="forty-two")  # in the middle of its sentence
    least, most = count_tokens(chat, about("", [(QUESTION, ANSWER)])), count_tokens(chat, conversation)
    max_tokens = round(least + share * (most - least))
    result = shorten(conversation, chat, max_tokens)
    if result is None:
        assert count_tokens(chat, about(parts[place], [(QUESTION, ANSWER)])) >= max_tokens - 3
    else:
        left = shortened_document(result[0])
        assert "forty-two" in left
        assert left == document or left in stretches(parts)
        assert result[1] == count_tokens(chat, result[0]) <= max_tokens


def test_the_beginning_stays_and_a_stretch_around_evidence_that_lies_far_behind(chat):
    sentences = [f"This is the sentence of number {number}. " for number in range(100)]
    conversation = about("".join(sentences), [(QUESTION, ANSWER)])
    room = count_tokens(chat, about("".join(sentences[:20]), [(QUESTION, ANSWER)]))
    for evidence, numbers in {"": (0, 20), sentences[3].strip(): (0, 20), "sentence of number 50": (40, 60)}.items():
        used, num_tokens = shorten(replace(conversation, evidence=evidence), chat, room)
        first, last = stretches(sentences)[shortened_document(used)]
        assert abs(first - numbers[0]) <= (2 if first else 0)
        assert abs(last - numbers[1]) <= 2
        assert num_tokens <= room
    end = about("".join(sentences), [(QUESTION, ANSWER)], evidence=sentences[-1].strip())
    assert shortened_document(shorten(end, chat, room)[0]).endswith("number 99.")


@pytest.mark.parametrize("num_sentences", [1, 12, 18])
def test_evidence_that_fills_most_of_the_room_is_kept_whole(chat, num_sentences):
    sentences = [f"This is the sentence of number {number}. " for number in range(100)]
    room = count_tokens(chat, about("".join(sentences[40:60]), [(QUESTION, ANSWER)]))
    evidence = "".join(sentences[50 : 50 + num_sentences]).strip()
    used, _ = shorten(about("".join(sentences), [(QUESTION, ANSWER)], evidence), chat, room)
    assert evidence in shortened_document(used)


def test_where_nothing_fits_there_is_no_record_and_never_a_cut_answer(chat):
    whole = Conversation([("Say much.", "Much is said here. " * 20)])
    num_tokens = count_tokens(chat, whole)
    assert shorten(whole, chat, num_tokens) == (whole, num_tokens)
    assert shorten(whole, chat, num_tokens - 1) is None  # it has no document
    long_answer = about("Short. Text.", [("Say much.", "Much is said here. " * 20)])
    assert shorten(long_answer, chat, num_tokens - 20) is None
    one_sentence = about("rome " * 100, [(QUESTION, ANSWER)])
    assert shorten(one_sentence, chat, count_tokens(chat, one_sentence) - 1) is None
    blank = about("\n\n" + "rome " * 100, [(QUESTION, ANSWER)])  # nothing but the blank lines before the sentence would be left
    assert shorten(blank, chat, count_tokens(chat, blank) - 1) is None


def test_text_before_and_behind_the_document_in_a_question_stays(chat):
    question = "Below is a paper. One here. Two here. Three here. Now the paper ends. What is it?"
    begin, end = question.index("One"), question.index(" Now")
    conversation = Conversation([(question, ANSWER)], (begin, end), system="Be brief.")
    used, _ = shorten(conversation, chat, count_tokens(chat, conversation) - 1)
    assert used.turns == [("Below is a paper. One here. Two here. Now the paper ends. What is it?", ANSWER)]
    assert used.messages()[0] == {"role": "system", "content": "Be brief."}


# --- build_sft_set ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluation_ngrams(tmp_path, tokenizer) -> EvaluationNgrams:
    tokenize_documents(["the quick brown fox jumps over the lazy dog", "a b c d e"], tokenizer, str(tmp_path / "proof.bin"))
    index_evaluation_sets({"proof": str(tmp_path / "proof.bin")}, tokenizer, 5, str(tmp_path / "ngrams.parquet"))
    return EvaluationNgrams(str(tmp_path / "ngrams.parquet"), threshold=1)


@pytest.fixture
def build(tmp_path, chat, evaluation_ngrams):
    """Build a set of sources; return the card, the records and the report on removed ones."""

    def run(sources: list[dict], **changes):
        settings = {"num_records": 40, "max_tokens": 200, "seed": 1, "allow_fewer": False, "max_malformed_share": 0.0}
        paths = {"output": str(tmp_path / "sft.parquet"), "removed": str(tmp_path / "removed.csv")}
        card = build_sft_set(sources=sources, tokenizer=chat, ngrams=evaluation_ngrams, **{**settings, **paths, **changes})
        return card, pyarrow.parquet.read_table(paths["output"]).to_pylist(), pandas.read_csv(paths["removed"])

    return run


def records_of(name: str, count: int = 40) -> list[dict]:
    return [{"input": f"{name} question {i}", "output": f"answer {i}"} for i in range(count)]


def source(tmp_path, name: str, share: float, records: list[dict], num_files: int = 1, schema: str = "input_output") -> dict:
    """A source whose records are dealt to some files."""
    paths = []
    for number in range(num_files):
        path = tmp_path / f"{name}-{number}-of-{num_files}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records[number::num_files]))
        paths.append(str(path))
    return {"name": name, "schema": schema, "share": share, "paths": paths}


def ids(rows: list[dict]) -> set[str]:
    return {row["id"] for row in rows}


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


def test_the_published_shares_of_38821_records():
    shares = {"natural_questions": 0.43, "book_summaries": 0.26, "evol_instruct": 0.19, "long_alpaca": 0.12}
    quotas = apportion(38_821, shares)
    assert sum(quotas.values()) == 38_821
    assert {name: round(100 * quota / 38_821) for name, quota in quotas.items()} == {
        "natural_questions": 43, "book_summaries": 26, "evol_instruct": 19, "long_alpaca": 12
    }  # fmt: skip
    assert all(abs(quotas[name] - share * 38_821) < 1 for name, share in shares.items())


def test_the_set_does_not_depend_on_the_order_of_records_or_files(tmp_path, build):
    records = records_of("a", 60)
    _, expected, _ = build([source(tmp_path, "a", 1.0, records)])
    for seed, num_files in enumerate([1, 2, 7]):
        random.Random(seed).shuffle(records)
        spread = source(tmp_path, "a", 1.0, records, num_files)
        assert build([spread])[1] == expected
        assert build([{**spread, "paths": spread["paths"][::-1]}])[1] == expected
        assert build([{**spread, "paths": [str(tmp_path / f"a-*-of-{num_files}.jsonl")]}])[1] == expected


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
    message = r"sft.num_records 100 of at most 200 tokens cannot be met: a has 40 of 75; sft.allow_fewer"
    with pytest.raises(ValueError, match=message):
        build(sources, num_records=100)
    with pytest.raises(ValueError, match=r"of at most 5 tokens cannot be met: a has 0 of 30; b has 0 of 10"):
        build(sources, max_tokens=5)
    card, rows, _ = build(sources, num_records=100, allow_fewer=True)
    assert Counter(row["source"] for row in rows) == {"a": 40, "b": 25}
    assert (card["records"], card["sources"]["a"]["wanted"], card["sources"]["a"]["taken"]) == (65, 75, 40)
    card, rows, _ = build(sources, max_tokens=5, allow_fewer=True)
    assert (rows, card["sources"]["b"]["too long"]) == ([], 40)


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


def test_too_many_malformed_records_stop_the_run(tmp_path, build):
    records = [*records_of("a"), {"input": "?", "output": ""}, {"input": "nul \0", "output": "!"}]
    sources = [source(tmp_path, "a", 1.0, records)]
    path = re.escape(sources[0]["paths"][0])
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


# --- chat template and tokens ----------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=30).filter(
    lambda text: text.strip() and "</s>" not in text and "<s>" not in text and "<unk>" not in text
)
TURNS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(turns=TURNS, system=st.just("") | TEXT, has_bos=st.booleans())
def test_exactly_the_answers_and_their_ends_are_learned(tokenizer, turns, system, has_bos):
    chat = with_or_without_bos(tokenizer, has_bos)
    tokens, labels = tokenize_conversation(chat, Conversation(turns, system=system).messages())
    learned = [label for label in labels if label != -100]
    assert tokenizer.decode(learned) == "".join(f" {answer}</s>" for _, answer in turns)
    assert learned.count(tokenizer.eos_token_id) == len(turns)
    assert all(label in (-100, token) for token, label in zip(tokens, labels, strict=True))
    said = "".join(f" USER: {question} ASSISTANT: {answer}</s>" for question, answer in turns)
    assert tokenizer.decode(tokens) == ("<s>" if has_bos else "") + (system or VICUNA_SYSTEM) + said
    assert (tokens[0] == tokenizer.bos_token_id) == has_bos


def test_the_end_token_is_learned_by_a_tokenizer_that_has_encoded_a_corpus(tmp_path, tokenizer):
    chat = with_or_without_bos(tokenizer, True)
    tokenize_documents(["It spells </s> out."], chat, str(tmp_path / "x.bin"))  # there, special tokens are text
    _, labels = tokenize_conversation(chat, Conversation([("?", "!")]).messages())
    assert labels[-1] == tokenizer.eos_token_id


def test_a_template_that_marks_no_answers_is_replaced(tokenizer):
    chat = with_or_without_bos(tokenizer, True)
    assert chat.chat_template == CHAT_TEMPLATE
    chat.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    assert with_chat_template(chat).chat_template == CHAT_TEMPLATE
    own = "{% for message in messages %}{% generation %}{{ message['content'] }}{% endgeneration %}{% endfor %}"
    chat.chat_template = own
    assert with_chat_template(chat).chat_template == own


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


def test_an_empty_set_is_an_empty_file(tmp_path, build, chat):
    build([source(tmp_path, "a", 1.0, records_of("a"))], max_tokens=5, allow_fewer=True)
    output = str(tmp_path / "sft.arrow")
    assert not tokenize_sft(records=str(tmp_path / "sft.parquet"), tokenizer=chat, held_out=0, output=output).get("records")
    assert len(read_tokenized_records(output)) == 0


@pytest.mark.parametrize("held_out", [0, 1, 30, 40, 50])
def test_held_out_records_never_reach_the_tokens(tmp_path, build, chat, held_out):
    _, rows, _ = build([source(tmp_path, "a", 1.0, records_of("a"))])
    output = str(tmp_path / "sft.arrow")
    card = tokenize_sft(records=str(tmp_path / "sft.parquet"), tokenizer=chat, held_out=held_out, output=output)
    found = [chat.decode(row["input_ids"]) for row in read_tokenized_records(output)]
    assert len(found) == card.get("records", 0) == max(0, 40 - held_out)
    for number, row in enumerate(rows):
        question = f" {row['messages'][0]['content']} ASSISTANT:"
        assert any(question in text for text in found) == (number < 40 - held_out)
