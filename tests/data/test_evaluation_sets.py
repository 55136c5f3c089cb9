import json
import random
import string
import unicodedata
from copy import deepcopy

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers

import longqlora.data.evaluation_sets
from longqlora.data.decontamination import EvaluationNgrams, index_evaluation_sets
from longqlora.data.evaluation_sets import (
    decoded_pieces,
    prepare_evaluation_set,
    retokenize_evaluation_set,
    texts_of_evaluation_set,
)
from longqlora.data.token_descriptions import document_spans, read_description
from longqlora.data.token_files import encode, read_tokens, tokenize_documents
from longqlora.training.pretraining import train_tokenizer


@pytest.fixture(scope="module")
def other(texts):
    """A tokenizer of another vocabulary."""
    return train_tokenizer([text.upper() for text in texts], vocab_size=700)


def documents(path: str, tokenizer) -> list[str]:
    stream, ends = read_tokens(path), read_description(path)["document_ends"]
    parts = [stream[begin:end] for begin, end in document_spans(ends)]
    assert all(part[-1] == tokenizer.eos_token_id for part in parts)
    return [tokenizer.decode(part[:-1]) for part in parts]


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=40)
TEXTS = st.lists(TEXT, min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(texts=TEXTS | st.just([" def f():\n\treturn 'naïve  , ok .'  \n", "", "Rome is old . Do n't"]))
def test_another_vocabulary_keeps_the_text_document_for_document(tmp_path_factory, tokenizer, other, texts):
    folder = tmp_path_factory.mktemp("sets")
    old, new = str(folder / "old.bin"), str(folder / "new.bin")
    tokenize_documents(texts, tokenizer, old)
    description = retokenize_evaluation_set(tokens=old, tokenizer=tokenizer, new_tokenizer=other, output=new)
    assert documents(new, other) == documents(old, tokenizer) == texts
    assert description["vocab_size"] == len(other) == 700
    assert description["num_tokens"] == len(read_tokens(new))


def test_ids_are_those_that_the_other_tokenizer_gives_the_text(tmp_path, texts, tokenizer, other):
    old, new, direct = (str(tmp_path / f"{name}.bin") for name in ("old", "new", "direct"))
    tokenize_documents(texts[:5], tokenizer, old)
    retokenize_evaluation_set(tokens=old, tokenizer=tokenizer, new_tokenizer=other, output=new)
    tokenize_documents(texts[:5], other, direct)
    numpy.testing.assert_array_equal(read_tokens(new), read_tokens(direct))


def test_a_published_stream_without_a_description_is_retokenized_too(tmp_path, tokenizer, other):
    ids = [*tokenizer("one two")["input_ids"], tokenizer.eos_token_id, *tokenizer("three four")["input_ids"]]
    numpy.array(ids, dtype="<u2").tofile(tmp_path / "published.bin")
    old, new = str(tmp_path / "old.bin"), str(tmp_path / "new.bin")
    prepare_evaluation_set([str(tmp_path / "published.bin")], tokenizer, old)
    retokenize_evaluation_set(tokens=old, tokenizer=tokenizer, new_tokenizer=other, output=new)
    (text,) = documents(new, other)
    assert "one two" in text
    assert "three four" in text


def test_a_stream_of_ids_that_another_tokenizer_made_is_warned_of(tmp_path, texts, tokenizer):
    """The file format does not record the tokenizer, and every id is in the vocabulary."""
    foreign = train_tokenizer([text.upper() for text in texts], vocab_size=512)
    for name, made_by in [("own", tokenizer), ("foreign", foreign)]:
        ids = made_by(texts[0].upper(), add_special_tokens=False)["input_ids"]
        numpy.array(ids, dtype="<u2").tofile(tmp_path / f"{name}.bin")
    assert "warning" not in prepare_evaluation_set([str(tmp_path / "own.bin")], tokenizer, str(tmp_path / "a.bin"))
    warning = prepare_evaluation_set([str(tmp_path / "foreign.bin")], tokenizer, str(tmp_path / "b.bin"))["warning"]
    assert "foreign.bin: the token ids seem to be those of another tokenizer" in warning
    assert "and the text begins with" in warning


def test_a_token_file_with_a_description_keeps_its_documents_and_the_type_of_its_ids(tmp_path, tokenizer):
    """Ids in 32 bit; read as 16 bit, each would be two."""
    ids = numpy.array([5, 6, 7, 8, 9], dtype="<u4")
    ids.tofile(tmp_path / "given.bin")
    given = {"dtype": "uint32", "num_tokens": 5, "document_ends": [2, 5]}
    (tmp_path / "given.json").write_text(json.dumps(given))
    description = prepare_evaluation_set([str(tmp_path / "given.bin")], tokenizer, str(tmp_path / "set.bin"))
    assert given.items() <= description.items()
    assert description["max_token_id"] == 9
    assert read_tokens(tmp_path / "set.bin").tolist() == ids.tolist()
    assert read_description(tmp_path / "set.bin") == description


# --- the texts that training texts are compared with -----------------------------------------------------------------------


def make_words(seed: int, number: int) -> list[str]:
    chooser = random.Random(seed)
    return ["".join(chooser.choices(string.ascii_lowercase, k=6)) for _ in range(number)]


def stream_of_longlora(folder, tokenizer, documents: list[str]) -> str:
    """uint16 ids with an end-of-text token after each document, and no description of where that is."""
    ids = [token for document in encode(tokenizer, documents) for token in [*document, tokenizer.eos_token_id]]
    numpy.array(ids, dtype="<u2").tofile(folder / "published.bin")
    return str(folder / "published.bin")


@pytest.mark.parametrize("tokens_per_piece", [64, 100, 2**18])
def test_a_stream_without_document_ends_is_found_also_across_pieces(tmp_path, tokenizer, monkeypatch, tokens_per_piece):
    monkeypatch.setattr(longqlora.data.evaluation_sets, "TOKENS_PER_PIECE", tokens_per_piece)
    monkeypatch.setattr(longqlora.data.evaluation_sets, "TOKENS_OF_OVERLAP", 60)  # five words have some 30
    documents = [make_words(1, 120), make_words(2, 90)]
    source = stream_of_longlora(tmp_path, tokenizer, map(" ".join, documents))
    path = str(tmp_path / "x.bin")
    prepare_evaluation_set([source], tokenizer, path)
    assert len(json.loads((tmp_path / "x.json").read_text())["document_ends"]) == 1
    pieces = list(decoded_pieces(path, tokenizer))
    assert (len(pieces) == 1) == (tokens_per_piece == 2**18)
    index_evaluation_sets({"x": pieces}, 5, str(tmp_path / "n.parquet"))
    ngrams = EvaluationNgrams(str(tmp_path / "n.parquet"), 1)
    for words in documents:
        for start in range(1, len(words) - 5):  # at the seam of two documents their words run together
            assert ngrams.overlaps(" ".join(words[start : start + 5])), start
    assert ngrams.overlaps(" ".join(make_words(3, 500))) == []


def test_pieces_of_a_long_document_hold_all_ngrams_and_no_others(tmp_path, tokenizer, monkeypatch):
    words = make_words(7, 2000)
    tokenize_documents([" ".join(words)], tokenizer, str(tmp_path / "x.bin"))
    pieces = decoded_pieces(str(tmp_path / "x.bin"), tokenizer)
    whole = index_evaluation_sets({"x": pieces}, 13, str(tmp_path / "whole.parquet"))
    monkeypatch.setattr(longqlora.data.evaluation_sets, "TOKENS_PER_PIECE", 1500)
    pieces = decoded_pieces(str(tmp_path / "x.bin"), tokenizer)
    index_evaluation_sets({"x": pieces}, 13, str(tmp_path / "pieces.parquet"))
    parts = [EvaluationNgrams(str(tmp_path / f"{name}.parquet"), 1).sets["x"] for name in ("whole", "pieces")]
    assert whole == {"x": 1988}
    assert set(parts[0]) <= set(parts[1])
    assert len(parts[1]) - len(parts[0]) < 2 * len(words) * 6 // 1500 + 10  # words that a seam cuts make a few of their own


FRENCH = "Les élèves étudièrent à l’école ﬁnement, où ils avaient été très gâtés par leurs maîtres et leurs mères."


@pytest.fixture(params=["nfc", "nfkc", "nfkd", "no accents", "loses characters"])
def lossy(request, tokenizer):
    """Tokenizers whose ids do not give every text back."""
    normalizer = {
        "nfc": normalizers.NFC(),
        "nfkc": normalizers.NFKC(),
        "nfkd": normalizers.NFKD(),
        "no accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]),
        "loses characters": normalizers.Replace(Regex("[^ a-z]"), ""),
    }[request.param]
    changed = deepcopy(tokenizer)
    changed.backend_tokenizer.normalizer = normalizer
    return changed


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_set_of_texts_is_compared_as_it_is_published(tmp_path, lossy, form, suffix):
    """Not as the tokenizer gives it back. A copy of it is found, in whatever form it is."""
    text, source = unicodedata.normalize(form, FRENCH), tmp_path / f"x{suffix}"
    source.write_text(text if suffix == ".txt" else json.dumps({"text": text}))
    tokens, index = str(tmp_path / "x.bin"), str(tmp_path / "n.parquet")
    prepare_evaluation_set([str(source)], lossy, tokens)
    texts = list(texts_of_evaluation_set([str(source)], tokens, lossy))
    assert texts == [text]
    counts = index_evaluation_sets({"x": texts}, 13, index)
    for copy in (FRENCH, unicodedata.normalize("NFD", FRENCH), unicodedata.normalize("NFKC", FRENCH)):
        (overlap,) = EvaluationNgrams(index, 1).overlaps(copy)
        assert overlap.shared_ngrams == overlap.num_ngrams == counts["x"]


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC(), normalizers.NFKC(), normalizers.NFKD()])
def test_a_copy_of_a_set_of_token_ids_is_found_though_the_tokenizer_normalizes(tmp_path, tokenizer, normalizer):
    normalizing = deepcopy(tokenizer)
    normalizing.backend_tokenizer.normalizer = normalizer
    source = stream_of_longlora(tmp_path, normalizing, [unicodedata.normalize("NFD", FRENCH)])
    tokens, index = str(tmp_path / "x.bin"), str(tmp_path / "n.parquet")
    prepare_evaluation_set([source], normalizing, tokens)
    index_evaluation_sets({"x": texts_of_evaluation_set([source], tokens, normalizing)}, 13, index)
    (overlap,) = EvaluationNgrams(index, 1).overlaps(FRENCH)
    assert overlap.shared_ngrams == overlap.num_ngrams


@pytest.mark.parametrize("form", ["one\r\ntwo\r\n", "one\rtwo\r", "\ufeffone\ntwo\n", "\ufeffone\r\ntwo\n"])
def test_line_ends_and_a_byte_order_mark_make_no_difference(tmp_path, tokenizer, form):
    """With them, the model would have to predict tokens that it never saw in training."""
    for name, text in (("plain", "one\ntwo\n"), ("other", form)):
        (tmp_path / f"{name}.txt").write_bytes(text.encode())
        prepare_evaluation_set([str(tmp_path / f"{name}.txt")], tokenizer, str(tmp_path / f"{name}.bin"))
    numpy.testing.assert_array_equal(read_tokens(str(tmp_path / "plain.bin")), read_tokens(str(tmp_path / "other.bin")))


def test_an_address_may_have_wildcards(tmp_path, tokenizer):
    for name in ("a1.txt", "a2.txt", "a[1].txt"):
        (tmp_path / name).write_text(f"text of {name}")
    output = str(tmp_path / "set.bin")
    for pattern, names in {"a*.txt": ["a1.txt", "a2.txt", "a[1].txt"], "a[12].txt": ["a1.txt", "a2.txt"]}.items():
        prepare_evaluation_set([f"file://{tmp_path}/{pattern}"], tokenizer, output)
        assert documents(output, tokenizer) == [f"text of {name}" for name in names]
    with pytest.raises(ValueError, match=r"b\*\.txt: no such file"):
        prepare_evaluation_set([f"file://{tmp_path}/b*.txt"], tokenizer, output)


def test_token_ids_may_be_found_by_a_wildcard_in_an_address_if_they_are_the_only_file(tmp_path, tokenizer):
    for name in ("a.bin", "b.bin"):
        numpy.array([5, 6, 7], dtype="<u2").tofile(tmp_path / name)
    prepare_evaluation_set([f"file://{tmp_path}/a*.bin"], tokenizer, str(tmp_path / "set.bin"))
    assert list(read_tokens(str(tmp_path / "set.bin"))) == [5, 6, 7]
    with pytest.raises(ValueError, match=r"a\.bin: a \.bin file must be the only path of its evaluation set, found 3 paths"):
        prepare_evaluation_set([f"file://{tmp_path}/*.bin"], tokenizer, str(tmp_path / "other.bin"))


def test_a_set_on_the_hub_is_recorded_with_its_commit(hub, tmp_path, tokenizer):
    commit = hub.add("datasets/owner/texts", {"a.jsonl": b'{"text": "Rome is old."}\n', "a.txt": b"Rome is old."}, "v1")
    output = str(tmp_path / "a.bin")
    for name in ("a.jsonl", "a.txt"):
        prepare_evaluation_set([f"hf://datasets/owner/texts@v1/{name}"], tokenizer, output)
        assert read_description(output)["sources"] == [f"hf://datasets/owner/texts@{commit}/{name}"]
        assert documents(output, tokenizer) == ["Rome is old."]
    (tmp_path / "a.txt").write_text("Rome is old.")
    prepare_evaluation_set([str(tmp_path / "a.txt")], tokenizer, output)
    assert "sources" not in read_description(output)
