import json

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longqlora.data.token_descriptions import (
    description_path,
    document_spans,
    largest_token,
    read_checked_description,
    read_description,
)
from longqlora.data.token_files import DTYPES, read_tokens, write_tokens


@given(st.lists(st.integers(0, 9), max_size=9))
def test_spans_cover_the_stream_document_by_document(sizes):
    ends = numpy.cumsum(sizes).tolist()
    spans = list(document_spans(ends))
    assert [end - begin for begin, end in spans] == sizes
    assert [end for _, end in spans] == ends
    assert [index for span in spans for index in range(*span)] == list(range(sum(sizes)))


def test_a_stream_with_no_description_is_one_document(tmp_path):
    numpy.arange(3, 500, dtype="<u2").tofile(tmp_path / "x.bin")
    assert read_description(tmp_path / "x.bin") == {"dtype": "uint16", "document_ends": [497]}
    described = write_tokens(tmp_path / "y.bin", [[5], [6, 7]], vocab_size=2**17, eos_token_id=2)
    assert read_description(tmp_path / "y.bin") == read_checked_description(tmp_path / "y.bin") == described


def test_a_truncated_stream_is_an_error(tmp_path):
    path = tmp_path / "x.bin"
    write_tokens(path, [[1, 2, 3]], vocab_size=512, eos_token_id=2)
    path.write_bytes(path.read_bytes()[:-2])
    for read in (read_tokens, largest_token):
        with pytest.raises(ValueError, match=r"has 3 tokens, but .*x\.json says 4"):
            read(path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_id_is_read_from_the_description_or_else_from_the_file(tmp_path, dtype):
    path = tmp_path / "x.bin"
    numpy.array([5, 60_000, 7], dtype=DTYPES[dtype]).tofile(path)
    description_path(path).write_text(json.dumps({"dtype": dtype, "document_ends": [3]}))
    assert largest_token(path) == 60_000
    description_path(path).write_text(json.dumps({"dtype": dtype, "document_ends": [3], "max_token_id": 61_000}))
    assert largest_token(path) == 61_000


@pytest.mark.parametrize(
    "content", ["[]", '{"title": "a book"}', '{"dtype": "int64", "document_ends": [1]}', '{"dtype": []}', "{"]
)
def test_another_file_of_the_descriptions_name_is_told(tmp_path, content):
    numpy.zeros(3, dtype="<u2").tofile(tmp_path / "x.bin")
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"x\.json: does not describe .*x\.bin \(dtype uint16 or uint32, document_ends\); rename"
    ):
        read_description(tmp_path / "x.bin")
