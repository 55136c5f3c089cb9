import json
import random
import string

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import longqlora.data.decontamination
from longqlora.data.decontamination import (
    EvaluationNgrams,
    check_clean,
    decoded_pieces,
    hash_ngrams,
    index_evaluation_sets,
    words_of,
)
from longqlora.data.evaluation_sets import prepare_evaluation_set
from longqlora.data.token_files import encode, tokenize_documents

WORDS = st.lists(st.sampled_from(["a", "b", "ab", "ba", "ä", "漢", "7"]), max_size=25)


def tuples(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def make_words(seed: int, number: int) -> list[str]:
    chooser = random.Random(seed)
    return ["".join(chooser.choices(string.ascii_lowercase, k=6)) for _ in range(number)]


@settings(max_examples=200, deadline=None)
@given(first=WORDS, second=WORDS, n=st.integers(2, 6))
def test_hashes_are_equal_exactly_where_the_ngrams_are(first, second, n):
    hashes = [hash_ngrams(words, n) for words in (first, second)]
    ngrams = [tuples(words, n) for words in (first, second)]
    assert [len(part) for part in hashes] == [len(part) for part in ngrams]
    known = dict(zip(ngrams[0] + ngrams[1], [int(value) for part in hashes for value in part], strict=True))
    assert [int(value) for part in hashes for value in part] == [known[ngram] for part in ngrams for ngram in part]
    assert len(set(known.values())) == len(known)


def test_very_many_different_ngrams_have_different_hashes():
    words = [
        str(number % 1009) + "x" * (number // 1009 % 7) for number in numpy.random.default_rng(1).integers(0, 7000, 2 * 10**5)
    ]
    assert len(numpy.unique(hash_ngrams(words, 13))) == len(words) - 12


def test_the_order_of_words_counts():
    assert hash_ngrams(["a", "b", "c"], 3) != hash_ngrams(["c", "b", "a"], 3)
    assert hash_ngrams(["ab", "c"], 2) != hash_ngrams(["a", "bc"], 2)


def test_hashes_are_the_same_on_every_machine():
    """Indexes are kept on disk, and pandas' hash of strings (SipHash with a fixed key) is part of them."""
    assert hash_ngrams(["call", "me", "ishmael"], 3).tolist() == [8381753281602408424]
    multiplier = 0x9E3779B97F4A7C15
    one, two = (int(hash_ngrams([word], 1)[0]) for word in ("call", "me"))
    assert hash_ngrams(["call", "me"], 2).tolist() == [(one * multiplier + two) % 2**64]


def test_words_have_neither_case_nor_punctuation():
    assert words_of("“Don’t,” said_he — 3.14 ÉTÉ!\n") == ["don", "t", "said_he", "3", "14", "été"]


@pytest.fixture
def index(tmp_path, tokenizer):
    """Indexes texts as evaluation sets, and loads them."""

    def build(n=5, threshold=1, **sets):
        paths = {name: str(tmp_path / f"{name}.bin") for name in sets}
        for name, texts in sets.items():
            tokenize_documents(texts, tokenizer, paths[name])
        output = str(tmp_path / "ngrams.parquet")
        build.counts = index_evaluation_sets(paths, tokenizer, n, output)
        return EvaluationNgrams(output, threshold)

    return build


@settings(max_examples=60, deadline=None)
@given(held_out=st.lists(WORDS, min_size=1, max_size=3), text=WORDS, n=st.integers(2, 4), threshold=st.integers(1, 3))
def test_overlaps_are_those_of_sets_of_tuples(tmp_path_factory, tokenizer, held_out, text, n, threshold):
    folder = tmp_path_factory.mktemp("x")
    held_out.append(["x"] * n)  # never empty, and in no text
    known = {ngram for words in held_out for ngram in tuples(words, n)}
    tokenize_documents(map(" ".join, held_out), tokenizer, str(folder / "x.bin"))
    counts = index_evaluation_sets({"x": str(folder / "x.bin")}, tokenizer, n, str(folder / "n.parquet"))
    assert counts == {"x": len(known)}
    found = EvaluationNgrams(str(folder / "n.parquet"), threshold).overlaps(" ".join(text))
    ngrams = tuples(text, n)
    shared = [ngram for ngram in ngrams if ngram in known]
    if len(set(shared)) < threshold:
        assert found == []
    else:
        (overlap,) = found
        assert (overlap.shared_ngrams, overlap.num_ngrams) == (len(set(shared)), len(set(ngrams)))
        assert overlap.example == " ".join(shared[0])


def test_layout_case_and_punctuation_hide_no_copy(index):
    ngrams = index(quote=["It was the best of times, it was the worst of times."])
    for copy in ("… IT WAS\nthe “Best”  of—times", "x it, was; the. worst: of! times? y"):
        (overlap,) = ngrams.overlaps(copy)
        assert overlap.evaluation_set == "quote"
    assert ngrams.overlaps("it was the very best of all times") == []
    assert ngrams.overlaps("best of times") == ngrams.overlaps("") == []


def test_each_evaluation_set_is_named_and_the_threshold_counts_in_each(index):
    first, second = make_words(1, 100), make_words(2, 100)
    text = " ".join([*make_words(3, 50), *first[10:20], *make_words(4, 50), *second[:7], *make_words(5, 9)])
    shared = {1: {"a": 6, "b": 3}, 3: {"a": 6, "b": 3}, 4: {"a": 6}, 7: {}}
    for threshold, expected in shared.items():
        ngrams = index(threshold=threshold, a=[" ".join(first)], b=[" ".join(second)])
        assert {overlap.evaluation_set: overlap.shared_ngrams for overlap in ngrams.overlaps(text)} == expected
    assert index.counts == {"a": 96, "b": 96}


def test_ngrams_do_not_reach_from_one_document_into_the_next(index):
    ngrams = index(x=["one two three four five", "six seven eight nine ten"])
    assert index.counts == {"x": 2}
    assert ngrams.overlaps("two three four five six seven eight nine") == []


def test_an_evaluation_set_without_n_words_in_a_row_is_an_error(index):
    with pytest.raises(ValueError, match=r"evaluation set 'short' has no 5 words in a row: lower decontamination\.ngram_words"):
        index(long=["one two three four five"], short=["one two three four", "five six"])


def stream_of_longlora(folder, tokenizer, documents: list[str]) -> str:
    """uint16 ids with an end-of-text token after each document, and no description of where that is."""
    ids = [token for document in encode(tokenizer, documents) for token in [*document, tokenizer.eos_token_id]]
    numpy.array(ids, dtype="<u2").tofile(folder / "published.bin")
    return str(folder / "published.bin")


@pytest.mark.parametrize("tokens_per_piece", [64, 100, 2**18])
def test_a_stream_without_document_ends_is_found_also_across_pieces(tmp_path, tokenizer, monkeypatch, tokens_per_piece):
    monkeypatch.setattr(longqlora.data.decontamination, "TOKENS_PER_PIECE", tokens_per_piece)
    monkeypatch.setattr(longqlora.data.decontamination, "TOKENS_OF_OVERLAP", 60)  # five words have some 30
    documents = [make_words(1, 120), make_words(2, 90)]
    source = stream_of_longlora(tmp_path, tokenizer, map(" ".join, documents))
    path = str(tmp_path / "x.bin")
    prepare_evaluation_set([source], tokenizer, path)
    assert len(json.loads((tmp_path / "x.json").read_text())["document_ends"]) == 1
    pieces = list(decoded_pieces(path, tokenizer))
    assert (len(pieces) == 1) == (tokens_per_piece == 2**18)
    index_evaluation_sets({"x": path}, tokenizer, 5, str(tmp_path / "n.parquet"))
    ngrams = EvaluationNgrams(str(tmp_path / "n.parquet"), 1)
    for words in documents:
        for start in range(1, len(words) - 5):  # at the seam of two documents their words run together
            assert ngrams.overlaps(" ".join(words[start : start + 5])), start
    assert ngrams.overlaps(" ".join(make_words(3, 500))) == []


def test_pieces_of_a_long_document_hold_all_ngrams_and_no_others(tmp_path, tokenizer, monkeypatch):
    words = make_words(7, 2000)
    tokenize_documents([" ".join(words)], tokenizer, str(tmp_path / "x.bin"))
    whole = index_evaluation_sets({"x": str(tmp_path / "x.bin")}, tokenizer, 13, str(tmp_path / "whole.parquet"))
    monkeypatch.setattr(longqlora.data.decontamination, "TOKENS_PER_PIECE", 1500)
    index_evaluation_sets({"x": str(tmp_path / "x.bin")}, tokenizer, 13, str(tmp_path / "pieces.parquet"))
    parts = [EvaluationNgrams(str(tmp_path / f"{name}.parquet"), 1).sets["x"] for name in ("whole", "pieces")]
    assert whole == {"x": 1988}
    assert set(parts[0]) <= set(parts[1])
    assert len(parts[1]) - len(parts[0]) < 2 * len(words) * 6 // 1500 + 10  # words that a seam cuts make a few of their own


def test_the_final_check_names_the_text_and_the_passage(index):
    ngrams = index(x=["one two three four five six"])
    check_clean(iter([("a", "seven eight nine ten eleven")]), ngrams, "the set")
    with pytest.raises(
        ValueError, match="the set: b shares 2 5-grams with the evaluation set 'x', such as “one two three four"
    ):
        check_clean(iter([("a", "seven"), ("b", "One, two, three, four, five, six!")]), ngrams, "the set")
