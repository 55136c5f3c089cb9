import bz2
import gzip
import hashlib
import json
import lzma
import sys

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longqlora.data.readers import (
    Fields,
    file_format,
    find_files,
    read_documents,
    read_parquet,
    write_parquet,
)

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PACKERS = {"": bytes, ".gz": gzip.compress, ".zst": zstd.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
TEXTS = ["Call me Ishmael.", "À la recherche\ndu temps perdu — 時間", "  indented \U0001f40b\n"]


def json_lines(records) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def contents(texts) -> dict[str, bytes]:
    """The texts as a file of each format that holds several."""
    records = [{"text": text} for text in texts]
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), sink)
    return {".jsonl": json_lines(records), ".json": json.dumps(records).encode(), ".parquet": sink.getvalue().to_pybytes()}


def write(folder, name: str, data: bytes) -> str:
    path = folder / name
    path.write_bytes(data)
    return str(path)


def texts_of(path, **options):
    return [document.text for document in read_documents(path, **options)]


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_every_json_format_is_read_in_every_compression(tmp_path, suffix, packed):
    path = write(tmp_path, f"x{suffix}{packed}", PACKERS[packed](contents(TEXTS)[suffix]))
    assert texts_of(path) == TEXTS
    assert [document.line for document in read_documents(path)] == [1, 2, 3]


@pytest.mark.parametrize("packed", PACKERS)
def test_plain_text_is_one_document_in_every_compression(tmp_path, packed):
    path = write(tmp_path, f"x.txt{packed}", PACKERS[packed]("".join(TEXTS).encode()))
    assert texts_of(path, fields=Fields("elsewhere.nested")) == ["".join(TEXTS)]  # the field's name is for records


def test_parquet_is_read_in_order_over_row_groups(tmp_path):
    texts = [f"text {number}" for number in range(300)]
    path = str(tmp_path / "x.parquet")
    write_parquet(path, pyarrow.schema([("text", "string")]), ({"text": text} for text in texts), rows_per_group=7)
    assert pyarrow.parquet.ParquetFile(path).num_row_groups == 43
    assert [(document.text, document.line) for document in read_documents(path)] == [(t, n + 1) for n, t in enumerate(texts)]


@settings(max_examples=50)
@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1), max_size=8))
def test_json_lines_and_parquet_hold_the_same_texts(tmp_path_factory, texts):
    folder, texts = tmp_path_factory.mktemp("x"), [f"a{text}" for text in texts]
    files = contents(texts) if texts else {".jsonl": b"", ".json": b"[]"}
    for suffix, data in files.items():
        assert texts_of(write(folder, f"x{suffix}", data)) == texts


def test_fields_may_be_nested_and_further_ones_are_kept(tmp_path):
    record = {"content": {"body": "text"}, "meta": {"set": {"name": "books"}}, "id": 7, "date": None}
    fields = Fields("content.body", "meta.set.name", ("id", "meta.set", "date", "no.where"))
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), sink)
    files = {".jsonl": json_lines([record]), ".json": json.dumps([record]).encode(), ".parquet": sink.getvalue().to_pybytes()}
    for suffix, data in files.items():
        (document,) = read_documents(write(tmp_path, f"x{suffix}", data), fields)
        assert (document.text, document.source) == ("text", "books")
        assert document.metadata == {"id": 7, "meta.set": {"name": "books"}, "date": None, "no.where": None}


def test_a_document_that_names_no_source_gets_the_given_one_or_its_file(tmp_path):
    records = [{"text": "a"}, {"text": "b", "meta": {"source": "C4"}}, {"text": "c", "meta": None}, {"text": "d", "meta": "x"}]
    path = write(tmp_path, "x.jsonl", json_lines(records))
    assert [document.source for document in read_documents(path, name="web")] == ["web", "C4", "web", "web"]
    assert [document.source for document in read_documents(path)] == [path, "C4", path, path]


def test_blank_lines_hold_nothing_and_still_count(tmp_path):
    path = write(tmp_path, "x.jsonl", b'\n{"text": "a"}\r\n  \n{"text": "b"}')
    assert [(document.text, document.line) for document in read_documents(path)] == [("a", 2), ("b", 4)]


def test_names_tell_the_format():
    assert [file_format(name) for name in ("a.jsonl.zst", "b.json", "hf://c/d.parquet", "e.txt.gz")] == [
        ".jsonl", ".json", ".parquet", ".txt",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"book\.pdf: unknown format; known are \.jsonl, \.json, \.parquet, \.txt"):
        file_format("book.pdf")
    with pytest.raises(ValueError, match="unknown format"):
        list(read_documents("book.jsonl.lz4"))


@pytest.fixture
def remote():
    """A folder of a file system that is not this machine's."""
    filesystem = fsspec.filesystem("memory")
    yield lambda name, data: filesystem.pipe(f"/corpus/{name}", data)
    filesystem.rm("/corpus", recursive=True)


def test_remote_files_are_found_by_wildcards_and_read(remote):
    for number in range(7):
        packed = list(PACKERS)[number % 5]
        remote(f"{number}.jsonl{packed}", PACKERS[packed](json_lines([{"text": f"text {number}"}])))
    remote("readme.md", b"not data")
    remote("table.parquet", contents(["in a table"])[".parquet"])
    found = find_files("memory://corpus/*.jsonl*")
    assert len(found) == 7
    assert found == sorted(found)
    assert all(path.startswith("memory://") for path in found)
    assert [text for path in found for text in texts_of(path)] == [f"text {number}" for number in range(7)]
    assert texts_of("memory://corpus/table.parquet") == ["in a table"]
    for jobs in (1, 2, 3, 10):
        parts = [find_files("memory://corpus/*.jsonl*", (number, jobs)) for number in range(jobs)]
        assert sorted(path for part in parts for path in part) == found
    with pytest.raises(ValueError, match=r"memory://corpus/\*\.csv: no such file"):
        find_files("memory://corpus/*.csv")


def test_a_path_without_wildcards_is_itself_whatever_the_part():
    assert find_files("memory://corpus/0.jsonl", (3, 5)) == ["memory://corpus/0.jsonl"]


def test_a_file_whose_name_has_brackets_is_itself(tmp_path):
    for name in ("b1.jsonl", "b[1].jsonl"):
        (tmp_path / name).touch()
    assert find_files(f"{tmp_path}/b[1].jsonl") == [f"{tmp_path}/b[1].jsonl"]


BAD_LINES = {
    b'{"text": ': "not valid JSON",
    b'{"text": "a"} {"text": "b"}': "not valid JSON",
    b'{"text": "caf\xe9"}': r"not valid JSON .*UTF-8",
    b'{"text": "\\ud800"}': "not valid JSON",
    b'["text"]': "expected a JSON object, found list",
    b'"text"': "expected a JSON object, found str",
    b"null": "expected a JSON object, found NoneType",
    b'{"txt": "misspelled", "id": 1}': "no text in the field 'text'; the record's fields are txt, id",
    b"{}": "no text in the field 'text'; the record's fields are none",
    b'{"text": null}': "no text in the field 'text'",
    b'{"text": 5}': "no text in the field 'text'",
    b'{"text": ""}': "empty text",
    b'{"text": " \\n\\t "}': "empty text",
    b'{"text": "ab\\u0000c"}': "NUL character in the text, at character 2",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_malformed_line_is_named_with_its_file_and_line_and_the_others_are_read(tmp_path, line):
    path = write(tmp_path, "bad.jsonl", b'{"text": "one"}\n\n' + line + b'\n{"text": "four"}\n')
    with pytest.raises(ValueError, match=rf"^{path}, line 3: {BAD_LINES[line]}"):
        list(read_documents(path))
    found = []
    assert texts_of(path, on_malformed=found.append) == ["one", "four"]
    assert [(malformed.path, malformed.line) for malformed in found] == [(path, 3)]


def test_malformed_records_of_a_json_list_are_named_by_number(tmp_path):
    path = write(tmp_path, "x.json", b'[{"text": "a"}, 5, {"text": ""}]')
    found = []
    assert texts_of(path, on_malformed=found.append) == ["a"]
    assert [str(malformed) for malformed in found] == [
        f"{path}, line 2: expected a JSON object, found int",
        f"{path}, line 3: empty text",
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"text": "a"}\n{"text": "b"}\n', "JSON lines are named .jsonl"),
        (b'{"text": "a"}', "found dict"),
        (b"[1, 2", "not valid"),
    ],
)
def test_a_json_file_that_is_no_list_is_an_error(tmp_path, data, message):
    with pytest.raises(ValueError, match=rf"x\.json: .*{message}"):
        list(read_documents(write(tmp_path, "x.json", data), on_malformed=[].append))


def test_invalid_utf8_of_a_text_file_is_named_with_its_line(tmp_path):
    path = write(tmp_path, "x.txt", "one\nzwei ü\n".encode() + b"caf\xe9\n")
    with pytest.raises(ValueError, match=rf"^{path}, line 3: not valid UTF-8 \(invalid continuation byte at byte 15\)"):
        list(read_documents(path))


def test_an_empty_text_file_is_malformed(tmp_path):
    with pytest.raises(ValueError, match=r"x\.txt, line 1: empty text"):
        list(read_documents(write(tmp_path, "x.txt", b"")))


def test_invalid_utf8_of_a_parquet_file_is_named_with_its_row(tmp_path):
    raw = pyarrow.array([b"fine", b"caf\xe9", b"fine, too"]).view(pyarrow.string())
    path = str(tmp_path / "x.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": raw}), path)
    found = []
    assert texts_of(path, on_malformed=found.append) == ["fine", "fine, too"]
    (malformed,) = found
    assert str(malformed).startswith(f"{path}, line 2: not valid UTF-8")


@pytest.fixture(scope="module")
def long_lines(texts) -> bytes:
    return json_lines({"text": line} for text in texts for line in text.splitlines() if line.strip())


@pytest.mark.parametrize("packed", [suffix for suffix in PACKERS if suffix])
def test_a_torn_file_of_every_compression_is_an_error_and_never_a_shorter_corpus(tmp_path, long_lines, packed):
    whole = PACKERS[packed](long_lines)
    for size in (0, 1, 3, 10, len(whole) // 3, len(whole) // 2, len(whole) - 100, *range(len(whole) - 12, len(whole))):
        path = write(tmp_path, f"torn.jsonl{packed}", whole[:size])
        with pytest.raises(ValueError, match=rf"torn\.jsonl{packed}: the file is damaged, truncated or cannot be read"):
            list(read_documents(path, on_malformed=[].append))
    two_streams = write(tmp_path, f"two.jsonl{packed}", whole + whole)
    assert len(texts_of(two_streams)) == 2 * long_lines.count(b"\n")
    path = write(tmp_path, f"torn.jsonl{packed}", whole + whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated"):
        list(read_documents(path))


@pytest.mark.parametrize("packed", [suffix for suffix in PACKERS if suffix])
def test_a_file_in_another_form_than_its_name_says_is_an_error(tmp_path, long_lines, packed):
    with pytest.raises(ValueError, match="the file is damaged"):
        list(read_documents(write(tmp_path, f"x.jsonl{packed}", long_lines)))


def test_a_torn_plain_file_is_noticed_by_its_last_line(tmp_path):
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: not valid JSON"):
        list(read_documents(write(tmp_path, "x.jsonl", json_lines([{"text": "a"}, {"text": "b"}])[:-4])))


def test_torn_or_other_parquet_files_are_errors(tmp_path):
    data = contents([f"text {number}" for number in range(1000)])[".parquet"]
    for damaged in (b"", b"garbage", b"PAR1" + b"garbage" * 20 + b"PAR1", data[:-1], data[: len(data) // 2]):
        with pytest.raises(ValueError, match=r"x\.parquet: the file is damaged, truncated or cannot be read"):
            list(read_documents(write(tmp_path, "x.parquet", damaged)))


@pytest.mark.parametrize("packed", PACKERS)
def test_an_empty_shard_holds_nothing(tmp_path, packed):
    assert texts_of(write(tmp_path, f"x.jsonl{packed}", PACKERS[packed](b""))) == []
    assert texts_of(write(tmp_path, f"x.json{packed}", PACKERS[packed](b"[]"))) == []


def test_an_empty_parquet_file_holds_nothing(tmp_path):
    path = str(tmp_path / "x.parquet")
    write_parquet(path, pyarrow.schema([("text", "string")]), [])
    assert list(read_parquet(path)) == []


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".txt", ".parquet"])
def test_what_cannot_be_read_is_a_clear_error(tmp_path, suffix):
    (tmp_path / f"folder{suffix}").mkdir()
    for path in (f"{tmp_path}/folder{suffix}", f"{tmp_path}/missing{suffix}", f"memory://missing/x{suffix}"):
        with pytest.raises(ValueError, match=rf"^{path}: .*cannot be read"):
            list(read_documents(path))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", *(f".jsonl{packed}" for packed in PACKERS if packed)])
def test_the_digest_is_that_of_the_file_as_stored(tmp_path, texts, suffix):
    base, _, packed = suffix[1:].partition(".")
    data = PACKERS[f".{packed}" if packed else ""](contents(texts * 5)[f".{base}"])
    digest = hashlib.sha256()
    assert texts_of(write(tmp_path, f"x{suffix}", data), digest=digest) == texts * 5
    assert digest.hexdigest() == hashlib.sha256(data).hexdigest()
