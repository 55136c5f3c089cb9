import json

import numpy
import pytest

from longqlora.data.evaluation_sets import prepare_evaluation_set
from longqlora.data.token_descriptions import document_spans
from longqlora.data.token_files import check_vocabulary, read_tokens, tokenize_documents, write_tokens


@pytest.mark.parametrize(("vocab_size", "item_bytes"), [(2**16, 2), (2**16 + 1, 4)])
def test_what_is_written_is_read_and_documents_end_where_the_description_says(tmp_path, vocab_size, item_bytes):
    path = tmp_path / "x.bin"
    documents = [[5, 6, vocab_size - 1], [], [7]]
    description = write_tokens(path, documents, vocab_size=vocab_size, eos_token_id=2)
    assert read_tokens(path).tolist() == [5, 6, vocab_size - 1, 2, 2, 7, 2]
    assert description["document_ends"] == [4, 5, 7]
    assert description["max_token_id"] == vocab_size - 1
    assert path.stat().st_size == 7 * item_bytes
    assert json.loads(path.with_suffix(".json").read_text()) == description


def test_longlora_files_are_read_as_they_are_published(tmp_path, tokenizer):
    published = tmp_path / "pg19.bin"
    ids = numpy.arange(3, 500, dtype="<u2")
    ids.tofile(published)
    prepare_evaluation_set([str(published)], tokenizer, str(tmp_path / "ours.bin"))
    assert read_tokens(tmp_path / "ours.bin").tolist() == ids.tolist()
    description = json.loads((tmp_path / "ours.json").read_text())
    assert (description["num_tokens"], description["max_token_id"]) == (497, 499)


def test_a_bad_stream_is_an_error_that_says_why(tmp_path, tokenizer):
    path = tmp_path / "bad.bin"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"bad\.bin: the file is empty, expected a stream of uint16 token ids"):
        read_tokens(path)
    path.write_bytes(b"123")
    with pytest.raises(ValueError, match="3 bytes are not a stream of uint16 token ids of 2 bytes each; the file is truncated"):
        read_tokens(path)
    numpy.array([3, 600], dtype="<u2").tofile(path)
    with pytest.raises(ValueError, match="token id 600, but the vocabulary of the tokenizer ends at 511"):
        check_vocabulary(path, len(tokenizer))
    with pytest.raises(ValueError, match="token id 600"):
        prepare_evaluation_set([str(path)], tokenizer, str(tmp_path / "out.bin"))
    with pytest.raises(ValueError, match="must be the only path"):
        prepare_evaluation_set([str(path), "x.txt"], tokenizer, str(tmp_path / "out.bin"))


def test_texts_come_back_from_their_tokens(tmp_path, texts, tokenizer):
    description = tokenize_documents(texts, tokenizer, str(tmp_path / "x.bin"))
    tokens = read_tokens(tmp_path / "x.bin")
    for text, (begin, end) in zip(texts, document_spans(description["document_ends"]), strict=True):
        assert tokenizer.decode(tokens[begin : end - 1]) == text
        assert tokens[end - 1] == tokenizer.eos_token_id
