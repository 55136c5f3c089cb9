import json

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longqlora.data.evaluation_sets import prepare_evaluation_set, retokenize_evaluation_set
from longqlora.data.token_descriptions import document_spans, read_description
from longqlora.data.token_files import read_tokens, tokenize_documents
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
