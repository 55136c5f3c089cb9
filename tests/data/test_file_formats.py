import pytest

from longqlora.data.file_formats import file_format


def test_names_tell_the_format():
    assert [file_format(name) for name in ("a.jsonl.zst", "b.json", "hf://c/d.parquet", "e.txt.gz")] == [
        ".jsonl", ".json", ".parquet", ".txt",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["book.pdf", "a.jsonl.idx", "a.jsonl.lz4", "a.bin", "README", "a.jsonl.zst.tmp", ".gz"])
def test_a_name_that_tells_no_format_is_an_error(name):
    with pytest.raises(ValueError, match=rf"^{name}: unknown format; known are \.jsonl, \.json, \.parquet, \.txt"):
        file_format(name)
