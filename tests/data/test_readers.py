import bz2
import gzip
import hashlib
import json
import lzma
import random
import sys
import tracemalloc
from decimal import Decimal
from itertools import islice
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longqlora.data.readers import Fields, find_files, normalized_record, read_documents, read_parquet, write_parquet

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
@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), min_size=1), max_size=8))
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


def test_a_source_may_be_the_number_0(tmp_path):
    path = write(tmp_path, "x.jsonl", json_lines([{"text": "a", "cluster": 0}, {"text": "b", "cluster": 1}]))
    assert [document.source for document in read_documents(path, Fields(source="cluster"))] == ["0", "1"]


@pytest.mark.parametrize("form", [json.dumps, str])
def test_fields_may_be_nested_in_an_object_that_is_stored_as_text(tmp_path, form):
    """As JSON or as Python's repr: ``meta`` of RedPajama, in the files that the library datasets makes."""
    meta = {"source": "arxiv", "url": 'it\'s "here"', "language": None, "scores": [0.5, True], "set": {"name": "é"}}
    record = {"text": "a", "meta": form(meta), "outer": {"meta": form(meta)}}
    fields = Fields(source="meta.source", metadata=("meta.url", "meta.language", "meta.scores", "outer.meta.set.name", "meta"))
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), sink)
    for suffix, data in {".jsonl": json_lines([record]), ".parquet": sink.getvalue().to_pybytes()}.items():
        (document,) = read_documents(write(tmp_path, f"x{suffix}", data), fields)
        assert document.source == "arxiv"
        assert list(document.metadata.values()) == [meta["url"], None, [0.5, True], "é", form(meta)]


@pytest.mark.parametrize(
    "meta",
    [
        "",
        "arxiv",
        "{",
        "{}",
        "{1, 2}",
        '["source"]',
        '"source"',
        "{'source'",
        "{'source': open('x')}",
        "{" * 9999,
        "\0",
        None,
        5,
    ],
)
def test_a_text_that_is_no_object_has_no_fields(tmp_path, meta):
    path = write(tmp_path, "x.jsonl", json_lines([{"text": "a", "meta": meta}]))
    (document,) = read_documents(path, Fields(metadata=("meta.url",)), name="web")
    assert (document.source, document.metadata) == ("web", {"meta.url": None})


def test_blank_lines_hold_nothing_and_still_count(tmp_path):
    path = write(tmp_path, "x.jsonl", b'\n{"text": "a"}\r\n  \n{"text": "b"}')
    assert [(document.text, document.line) for document in read_documents(path)] == [("a", 2), ("b", 4)]


def test_a_file_of_an_unknown_format_is_not_read():
    with pytest.raises(ValueError, match=r"^book\.jsonl\.lz4: unknown format"):
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


def test_an_address_is_itself_if_there_is_such_a_file_and_what_a_wildcard_finds_is_not_expanded_again(remote, monkeypatch):
    monkeypatch.setattr("fsspec.core.DEFAULT_EXPAND", True)  # the user's fsspec configuration may say so
    for name in ("a1.jsonl", "a[1].jsonl", "b?.jsonl", "bc.jsonl"):
        remote(name, json_lines([{"text": name}]))
    for name in ("a[1].jsonl", "b?.jsonl"):
        assert [text for path in find_files(f"memory://corpus/{name}") for text in texts_of(path)] == [name]
    found = find_files("memory://corpus/*.jsonl")
    assert [texts_of(path) for path in found] == [["a1.jsonl"], ["a[1].jsonl"], ["b?.jsonl"], ["bc.jsonl"]]
    assert sum(len(find_files("memory://corpus/b?.jsonl", (number, 3))) for number in range(3)) == 1  # by one of several jobs


def test_a_path_without_wildcards_is_itself_whatever_the_part():
    assert find_files("memory://corpus/0.jsonl", (3, 5)) == ["memory://corpus/0.jsonl"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".txt", ".parquet"])
def test_a_local_file_is_read_itself_whatever_its_name(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr("fsspec.core.DEFAULT_EXPAND", True)  # the user's fsspec configuration may say so
    names = [f"{name}{suffix}" for name in ("b1", "b[1]", "c?", "cd", "e*", "ef")]
    for name in names:
        write(tmp_path, name, (contents([name]) | {".txt": name.encode()})[suffix])
    for name in names:
        (path,) = find_files(f"{tmp_path}/{name}")
        assert texts_of(path) == [name]
    missing = f"{tmp_path}/b[12]{suffix}"
    assert find_files(missing) == [missing]


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
    b'{"text": NaN}': "no text in the field 'text'",
    b'{"text": "a", "score": nan}': "not valid JSON",
    b'{"text": "a", "score": NaN, "name": "\\ud800"}': "not valid JSON .*surrogates",
    b'{"text": "caf\xe9", "score": NaN}': "not valid JSON .*utf-8",
    b'{"score": NaN, "deep": ' + b"[" * 99999: "not valid JSON .*recursion",
    b'{"text": "\xef\xbb\xbf"}': "empty text",
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


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("begin", [b"", b"\n \n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n"])
def test_the_content_tells_json_lines_from_a_list_whatever_the_name(tmp_path, packed, begin):
    """C4 and RedPajama-V2 have JSON lines in files named .json.gz."""
    records = [{"text": text} for text in TEXTS]
    forms = [json_lines(records), json.dumps(records).encode(), json.dumps(records, indent=1).encode(), json_lines(records[:1])]
    for name in ("x.json", "x.jsonl"):
        found = [texts_of(write(tmp_path, name + packed, PACKERS[packed](begin + form))) for form in forms]
        assert found == [TEXTS, TEXTS, TEXTS, TEXTS[:1]]


def test_json_lines_named_json_are_read_one_at_a_time(tmp_path):
    lines = json_lines({"text": f"text {number}" + " word" * 1000} for number in range(2000))
    documents = read_documents(write(tmp_path, "x.json", lines + b"{"))
    tracemalloc.start()
    assert len(list(islice((document.line for document in documents), 2000))) == 2000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < len(lines) / 2
    with pytest.raises(ValueError, match=r"x\.json, line 2001: not valid JSON"):
        next(documents)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{\n "text": "a"\n}', r"expected one list of records, or one record per line, but the first line .*: '{\\n'$"),
        (b'{"version": 1, "data": [\n{"text": "a"}\n]}', "the first line is not valid JSON by itself"),
        (b'{"data": [{"text": "a"}]}', "no text in the field 'text'; the record's fields are data"),
        (b"[1, 2", "begins like a list of records, but is not valid JSON"),
        (b'[{"text": "a"}]\n[{"text": "b"}]\n', "begins like a list of records, but is not valid JSON"),
        (b"[" * 9999, "not valid JSON"),
    ],
)
def test_a_json_file_of_another_form_is_an_error(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        list(read_documents(write(tmp_path, "x.json", data)))


UNUSUAL_LINES = {
    b'{"score": NaN, "text": "a"}': {"score": None},
    b'{"text": "a", "score": [-Infinity, {"max": Infinity}, 1.5]}': {"score": [None, {"max": None}, 1.5]},
    b'{"text": "a", "score": "NaN"}': {"score": "NaN"},
    b'\xef\xbb\xbf{"text": "a"}': {"score": None},
    b'\xef\xbb\xbf{"text": "a", "score": NaN}': {"score": None},
    b'{"text": "b", "text": "a"}': {"score": None},
}


@pytest.mark.parametrize("line", UNUSUAL_LINES)
def test_a_line_that_python_would_write_or_that_begins_with_a_byte_order_mark_is_read(tmp_path, line):
    fields = Fields(metadata=("score",))
    begin = b'{"text": "first"}\n'
    _, document = read_documents(write(tmp_path, "x.jsonl", begin + line + b"\n"), fields)
    assert (document.text, document.line, document.metadata) == ("a", 2, UNUSUAL_LINES[line])
    (document,) = read_documents(write(tmp_path, "x.json", b"[" + line.removeprefix(b"\xef\xbb\xbf") + b"]"), fields)
    assert (document.text, document.metadata) == ("a", UNUSUAL_LINES[line])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.txt", "x.txt.gz"])
def test_another_encoding_that_a_byte_order_mark_tells_is_an_error(tmp_path, encoding, name):
    data = ("" if encoding in ("utf-16", "utf-32") else "\ufeff").encode(encoding) + b'{"text": "a"}'.decode().encode(encoding)
    path = write(tmp_path, name, PACKERS[Path(name).suffix if name.endswith("gz") else ""](data))
    with pytest.raises(ValueError, match=rf"{name}: the byte order mark says UTF-16 or UTF-32, expected UTF-8; .*iconv"):
        list(read_documents(path, on_malformed=[].append))


@pytest.mark.parametrize(
    "text", ["one\r\ntwo\r\n", "one\rtwo\r", "\ufeffone\ntwo\n", "\ufeff\ufeffone\r\ntwo\n", "one\ntwo\r\n"]
)
def test_line_ends_and_a_byte_order_mark_make_no_difference_in_any_format(tmp_path, text):
    for suffix, data in (contents([text]) | {".txt": text.encode()}).items():
        assert texts_of(write(tmp_path, f"x{suffix}", data)) == ["one\ntwo\n"]
    (path,) = [write(tmp_path, "nested.jsonl", json_lines([{"data": {"body": text}}]))]
    assert texts_of(path, fields=Fields("data.body")) == ["one\ntwo\n"]


def test_a_byte_order_mark_inside_a_text_and_other_line_ends_stay(tmp_path):
    text = "one \ufeff two\u2028three\x85four\x0bfive"
    for suffix, data in (contents([text]) | {".txt": text.encode()}).items():
        assert texts_of(write(tmp_path, f"x{suffix}", data)) == [text]


def test_a_record_is_normalized_at_any_depth():
    record = {"a": ["x\r\ny", {"b": "\ufeffx\ry"}], "n": 5, "none": None, "f": float("nan"), "d": Decimal("1.5")}
    assert str(normalized_record(record)) == str({**record, "a": ["x\ny", {"b": "x\ny"}]})
    clean = {"a": [r"C:\run", "x\ny"], "b": b"\r\n"}
    assert normalized_record(clean) == clean


def test_invalid_utf8_of_a_text_file_is_named_with_its_line(tmp_path):
    path = write(tmp_path, "x.txt", "one\nzwei ü\n".encode() + b"caf\xe9\n")
    with pytest.raises(ValueError, match=rf"^{path}, line 3: not valid UTF-8 \(invalid continuation byte at byte 15\)"):
        list(read_documents(path))


def test_an_empty_text_file_is_malformed(tmp_path):
    with pytest.raises(ValueError, match=r"x\.txt, line 1: empty text"):
        list(read_documents(write(tmp_path, "x.txt", b"")))


def test_reading_a_parquet_file_takes_memory_for_a_row_group_only(tmp_path):
    path, generator = str(tmp_path / "texts.parquet"), random.Random(1)
    schema = pyarrow.schema([("text", "string")])
    write_parquet(path, schema, ({"text": generator.randbytes(50_000).hex()} for _ in range(100)), rows_per_group=2)
    tracemalloc.start()
    assert sum(1 for _ in read_parquet(path)) == 100
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000 < Path(path).stat().st_size / 4


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
