import random
import re
import string
import unicodedata

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longqlora.data.decontamination import (
    EvaluationNgrams,
    check_clean,
    hash_ngrams,
    index_evaluation_sets,
    words_of,
)

WORDS = st.lists(st.sampled_from(["a", "b", "ab", "ba", "ø", "漢", "7"]), max_size=25)


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
    assert words_of("“Don’t,” said_he — 3.14 ÉTÉ!\n") == ["don", "t", "said_he", "3", "14", "ete"]


SAME_WORDS = {
    "accents": ("Les élèves naïfs", "Les e\u0301le\u0300ves nai\u0308fs", "LES ELEVES NAIFS"),
    "compatibility": ("a fine ① office ½ｗｏｒｄ", "a ﬁne 1 oﬃce 1⁄2word"),
    "case": ("STRASSE ΟΔΟΣ", "straße οδος"),
    "signs of vowels": ("हिन्दी में", "हनद म"),  # one word each, not one for each consonant
    "jamo": ("한국어 말", "\u1112\u1161\u11ab\u1100\u116e\u11a8\u110b\u1165 \u1106\u1161\u11af"),
    "soft hyphens": ("the computer ran", "the com\xadputer ran", "the com\xad\n  puter ran", "the com\xad puter r\xadan"),
    "zero width": ("the computer ran", "\ufeffthe com\u200bputer r\u200d\u2060an"),
    "line ends": ("a computer, well-known", "a com-\nputer, well-\r\n\tknown", "a com- puter, well\u2011known"),
    "emphasis": ("a _very_ well-_known_ __man__", "a *very* _well-known_ **man**", "_a very well_-known man"),
    "blanks to fill in": ("the ____ of __ x_", "the of x"),
}  # fmt: skip


@pytest.mark.parametrize("copies", SAME_WORDS.values(), ids=SAME_WORDS)
def test_copies_have_the_same_words(copies):
    first, *others = (words_of(copy) for copy in copies)
    assert all(first == other for other in others), [first, *others]


def test_hyphens_join_letters_only_and_underscores_stay_inside_a_name():
    assert words_of("1990-1995 1990–1995 a--b a -b p-1") == ["1990", "1995", "1990", "1995", "a", "b", "a", "b", "p", "1"]
    assert words_of("snake_case(self._a__b, __init__)") == ["snake_case", "self", "a__b", "init"]


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("aé-_ \n\xad\u0301ﬁが한"), max_size=30))
@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_words_are_the_same_in_every_unicode_form(form, text):
    """Tokenizers normalize to one of these forms, and texts are published in any of them."""
    assert words_of(unicodedata.normalize(form, text)) == words_of(text)


ALICE = """Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or
twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, and what is the use of
a book, thought Alice, without pictures or conversations? So she was considering in her own mind, as well as she could, for the
hot day made her feel very sleepy and stupid, whether the pleasure of making a daisy-chain would be worth the trouble."""


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        (r"(\w{3})(\w{3})", "\\1\xad\\2"),
        (r"(\w{3})(\w{3})", "\\1\xad\n\\2"),
        (r"(\w{3})(\w{3})", "\\1-\n\\2"),
        ("-", "-\n"),
        (r"\b(very|nothing|use|well|her)\b", r"_\1_"),
        ("([aeiou])", "\\1\u0301"),
    ],
    ids=["soft hyphens", "soft hyphens at line ends", "hyphenated lines", "broken compounds", "emphasis", "accents"],
)
def test_layout_of_print_hides_no_passage(index, pattern, replacement):
    """Every n-gram is found, so a copy of 13 words is, too."""
    ngrams, copy = index(n=13, alice=[ALICE]), re.sub(pattern, replacement, ALICE)
    assert copy != ALICE
    (overlap,) = ngrams.overlaps(copy)
    assert overlap.shared_ngrams == overlap.num_ngrams == index.counts["alice"]


@pytest.fixture
def index(tmp_path):
    """Indexes texts as evaluation sets, and loads them."""

    def build(n=5, threshold=1, **sets):
        output = str(tmp_path / "ngrams.parquet")
        build.counts = index_evaluation_sets(sets, n, output)
        return EvaluationNgrams(output, threshold)

    return build


@settings(max_examples=60, deadline=None)
@given(held_out=st.lists(WORDS, min_size=1, max_size=3), text=WORDS, n=st.integers(2, 4), threshold=st.integers(1, 3))
def test_overlaps_are_those_of_sets_of_tuples(tmp_path_factory, held_out, text, n, threshold):
    folder = tmp_path_factory.mktemp("x")
    held_out.append(["x"] * n)  # never empty, and in no text
    known = {ngram for words in held_out for ngram in tuples(words, n)}
    counts = index_evaluation_sets({"x": map(" ".join, held_out)}, n, str(folder / "n.parquet"))
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


def test_the_final_check_names_the_text_and_the_passage(index):
    ngrams = index(x=["one two three four five six"])
    check_clean(iter([("a", "seven eight nine ten eleven")]), ngrams, "the set")
    with pytest.raises(
        ValueError, match="the set: b shares 2 5-grams with the evaluation set 'x', such as “one two three four"
    ):
        check_clean(iter([("a", "seven"), ("b", "One, two, three, four, five, six!")]), ngrams, "the set")
