import gzip
import json
import random
from collections import Counter

import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from longqlora.documents import Document, read_documents
from longqlora.sampling import bottom_k, priority, sample_corpus, texts_in_range


@settings(max_examples=100)
@given(st.lists(st.integers(0, 200), max_size=60), st.integers(1, 30), st.randoms())
def test_bottom_k_is_the_sorted_head_of_the_distinct_items_in_any_order(keys, k, shuffler):
    items = [(priority(str(key), seed=1), str(key), key) for key in keys]
    expected = sorted(set(items))[:k]
    shuffler.shuffle(items)
    assert list(bottom_k(items, k)) == expected


def test_every_document_is_equally_likely():
    counts = Counter()
    for seed in range(2000):
        counts.update(key for _, key, _ in bottom_k(((priority(str(i), seed), i, None) for i in range(10)), 3))
    for i in range(10):  # expected 600, standard deviation 20.5
        assert 500 < counts[i] < 700


@pytest.fixture
def corpus(texts):
    """300 different documents of all lengths, five of them twice."""
    lines = [line for text in texts for line in text.split("\n\n") if line.strip()]
    documents = list(dict.fromkeys(lines))[:300]
    return documents + documents[:5]


def write_shards(folder, documents, number):
    """The documents over ``number`` shards, each in another compression."""
    paths = []
    for shard in range(number):
        data = b"".join(json.dumps({"text": t, "meta": {"source": "x"}}).encode() + b"\n" for t in documents[shard::number])
        suffix, pack = [("", bytes), (".gz", gzip.compress), (".zst", zstandard.compress)][shard % 3]
        path = folder / f"{number}-{shard}.jsonl{suffix}"
        path.write_bytes(pack(data))
        paths.append(str(path))
    return paths


def sample(folder, corpus, tokenizer, shards, k, seed=7):
    output = folder / "sample.parquet"
    card = sample_corpus(
        sources=write_shards(folder, corpus, shards),
        text_field="text",
        tokenizer=tokenizer,
        num_texts=k,
        min_tokens=20,
        max_tokens=200,
        seed=seed,
        output=str(output),
    )
    return pyarrow.parquet.read_table(output).to_pylist(), card


def test_the_sample_does_not_depend_on_shards_or_order_and_grows_with_k(tmp_path, corpus, tokenizer):
    reference, card = sample(tmp_path, corpus, tokenizer, shards=1, k=40)
    for number in (2, 5):
        shuffled = corpus.copy()
        random.Random(number).shuffle(shuffled)
        rows, _ = sample(tmp_path, shuffled, tokenizer, shards=number, k=40)
        assert [row["id"] for row in rows] == [row["id"] for row in reference]
    larger, _ = sample(tmp_path, corpus, tokenizer, shards=3, k=60)
    assert {row["id"] for row in reference} < {row["id"] for row in larger}
    other, _ = sample(tmp_path, corpus, tokenizer, shards=1, k=40, seed=8)
    assert {row["id"] for row in other} != {row["id"] for row in reference}
    assert len({row["text"] for row in larger}) == 60
    for row in reference:
        assert row["num_tokens"] == len(tokenizer(row["text"], add_special_tokens=False)["input_ids"])
        assert 20 <= row["num_tokens"] <= 200
    counts = card["texts"]
    assert counts["read"] == len(corpus) == counts["too short"] + counts["too long"] + counts["in range"]


def test_texts_in_range_finds_what_tokenising_everything_finds(corpus, tokenizer):
    counts = Counter()
    documents = [Document(text, "x") for text in corpus]
    found = {d.text: n for d, n in texts_in_range(documents, tokenizer, 20, 200, counts)}
    lengths = {text: len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in corpus}
    assert found == {text: n for text, n in lengths.items() if 20 <= n <= 200}


def test_too_few_texts_is_an_error_that_counts_them(tmp_path, corpus, tokenizer):
    with pytest.raises(ValueError, match=r"asks for 5000 texts .* hold \d+ different ones"):
        sample(tmp_path, corpus, tokenizer, shards=1, k=5000)


def test_malformed_records_name_file_and_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: not valid JSON"):
        list(read_documents(str(path)))
    path.write_text('{"txt": "misspelt"}\n')
    with pytest.raises(ValueError, match=r"record 1: no text under 'text'; the record's fields are txt"):
        list(read_documents(str(path)))
    with pytest.raises(ValueError, match="unknown format"):
        list(read_documents("book.pdf"))


def test_plain_text_is_one_document_a_file(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("Chapter 1\n\nÀ la recherche …", encoding="utf-8")
    assert [document.text for document in read_documents(str(path))] == ["Chapter 1\n\nÀ la recherche …"]
