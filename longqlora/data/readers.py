"""Readers of the formats in which corpora are published; records are read one at a time.

Formats: JSON lines or one JSON list (``.jsonl`` or ``.json``; the content tells which), Parquet, and plain text (``.txt``, one
document per file). All but Parquet may be compressed (``.gz``, ``.zst``, ``.bz2``, ``.xz``). A path is whatever ``fsspec``
opens: a local file, ``hf://datasets/…``, ``s3://…``.

The same text must be the same string in whatever file it is published, or neither duplicates nor passages of evaluation sets
would be found. So line ends become ``\\n``, and a byte order mark at the beginning is removed (:func:`normalized`).

A record that cannot be used is *malformed*: the reader reports its place and the reason to the caller, and skips none silently.
A file that is truncated or cannot be opened is an error at once, because nobody knows how much of it is missing.
"""

import ast
import glob
import io
import json
import lzma
import sys
import zlib
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from typing import Any, NamedTuple, NoReturn

import fsspec
import orjson
import pyarrow
import pyarrow.parquet
from fsspec.compression import compr
from fsspec.utils import infer_compression

from longqlora.data.file_formats import file_format
from longqlora.data.hub import pinned_file

if sys.version_info >= (3, 14):
    from compression.zstd import ZstdError
else:
    from backports.zstd import ZstdError  # fsspec reads .zst with it too; the package zstandard accepts a truncated file

READ_ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError, ZstdError, pyarrow.ArrowInvalid)
JSON_ERRORS = (ValueError, TypeError, RecursionError)  # of parse_json
OTHER_MARKS = (BOM_UTF16_LE, BOM_UTF16_BE, BOM_UTF32_BE)  # that of UTF-32-LE begins like that of UTF-16-LE
BUFFER_BYTES = 2**20  # large, so that a line with a long text takes one read instead of dozens
NORMALIZATION = "line ends are \\n, and a byte order mark at the beginning is removed"  # for the data cards
ROWS_PER_GROUP = 64  # of a Parquet file; that many rows are in memory when it is written or read


class Document(NamedTuple):
    """A text with its source, the metadata kept of its record, and its place: the file, and the line or row in it."""

    text: str
    source: str
    metadata: dict
    path: str
    line: int


class Malformed(NamedTuple):
    """A record that cannot be used: its file, its line or row, and the reason."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}, line {self.line}: {self.reason}"


OnMalformed = Callable[[Malformed], None]
NumberedRecords = Iterator[tuple[int, dict]]  # (line or row, record)


@dataclass(frozen=True)
class Fields:
    """Names of a record's fields; dots lead into nested objects (``meta.source``). The defaults are RedPajama's.

    Attributes:
        text: field of the text.
        source: field that names the subset of the corpus that a text belongs to.
        metadata: further fields to keep.
    """

    text: str = "text"
    source: str = "meta.source"
    metadata: tuple[str, ...] = ()


def raise_malformed(malformed: Malformed) -> NoReturn:
    """Do not tolerate a malformed record.

    Raises:
        ValueError: always; the message names the file and the line.
    """
    raise ValueError(str(malformed))


def find_files(path: str, part: tuple[int, int] = (0, 1)) -> list[str]:
    """Files that a path names: the path itself, or the matches of the wildcards in an address, sorted by name. Files on the hub
    are at the commit that their revision has now.

    Wildcards of local files are expanded when the configuration is read, so a local path is the name of one file, and so is an
    address with brackets, ``?`` or ``*`` if there is such a file.

    Args:
        path: a local file, or an address with or without wildcards.
        part: (number, count): with wildcards, every ``count``-th match from match ``number`` on.

    Raises:
        ValueError: if nothing matches.
    """
    path = pinned_file(path)
    if "://" not in path or not glob.has_magic(path):
        return [path]
    filesystem, pattern = fsspec.url_to_fs(path)
    if filesystem.isfile(pattern):
        found = [path]
    else:
        found = [filesystem.unstrip_protocol(name) for name in sorted(filesystem.glob(pattern))]
    if not found:
        raise ValueError(f"{path}: no such file")
    return found[part[0] :: part[1]]


class HashingReader(io.RawIOBase):
    """File that updates a hash with every byte that is read from it.

    Args:
        file: opened in binary mode.
        digest: hash object of ``hashlib``, or None.
    """

    def __init__(self, file, digest):
        self.file, self.digest = file, digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        size = self.file.readinto(buffer)
        if self.digest is not None:
            self.digest.update(memoryview(buffer)[:size])
        return size


@contextmanager
def open_binary(path: str, digest=None) -> Iterator[io.BufferedReader]:
    """Open a file for reading bytes, decompressed according to its name.

    Args:
        path: whatever ``fsspec`` opens.
        digest: hash object of ``hashlib`` that is updated with the bytes as stored.

    Raises:
        ValueError: if the file cannot be opened or is truncated.
    """
    compression = infer_compression(path)
    try:
        with fsspec.open(path, "rb", expand=False) as stored:
            raw = io.BufferedReader(HashingReader(stored, digest), BUFFER_BYTES)
            if compression and not raw.peek(1):  # gzip would accept it as a complete file without content
                raise EOFError("it has no bytes")
            with compr[compression](raw, mode="rb") as file, io.BufferedReader(file, BUFFER_BYTES) as buffered:
                yield buffered
    except READ_ERRORS as error:
        raise ValueError(
            f"{path}: the file is damaged, truncated or cannot be read ({error or type(error).__name__})"
        ) from None


@contextmanager
def open_text(path: str, digest=None) -> Iterator[io.BufferedReader]:
    """Open a file of UTF-8 text for reading bytes, see :func:`open_binary`, after its byte order mark if it has one.

    Raises:
        ValueError: if the file cannot be opened, is truncated, or its byte order mark says UTF-16 or UTF-32.
    """
    with open_binary(path, digest) as file:
        begin = file.peek(len(BOM_UTF32_BE))
        if begin.startswith(OTHER_MARKS):
            raise ValueError(
                f"{path}: the byte order mark says UTF-16 or UTF-32, expected UTF-8; convert the file, for example with "
                "iconv -f UTF-16 -t UTF-8"
            )
        if begin.startswith(BOM_UTF8):
            file.read(len(BOM_UTF8))
        yield file


def parse_json(data: bytes) -> Any:
    """Value of a JSON text. ``NaN``, ``Infinity`` and ``-Infinity``, which JSON lacks and Python writes, are read as None.

    Raises:
        ValueError, TypeError, RecursionError: if it is not valid.
    """
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        if data.startswith(BOM_UTF8):  # of a file that was appended to another
            return parse_json(data.removeprefix(BOM_UTF8))
        if b"NaN" not in data and b"Infinity" not in data:
            raise
        value = json.loads(data.decode(), parse_constant=lambda name: None)
        return orjson.loads(orjson.dumps(value))  # everything else is as strict as it is without NaN


def read_json(path: str, on_malformed: OnMalformed, digest=None) -> NumberedRecords:
    """Yield (number, object) of a JSON file: of one list, which is read into memory, or of JSON lines.

    It is a list if its first character is a bracket. The number is that of the record in the list, or that of the line.

    Raises:
        ValueError: if the file holds neither, such as an object over several lines.
    """
    with open_text(path, digest) as file:
        lines = enumerate(file, start=1)
        first, line = next((numbered for numbered in lines if numbered[1].strip()), (1, b""))
        if line.lstrip().startswith(b"["):
            yield from list_records(path, line + file.read(), on_malformed)
            return
        if file_format(path) == ".json" and line.strip():
            check_first_line(path, line)
        yield from line_records(path, chain([(first, line)], lines), on_malformed)


def check_first_line(path: str, line: bytes) -> None:
    """Check that a line is complete. In a ``.jsonl`` file, one that is not is malformed, like any other.

    Raises:
        ValueError: if it is not valid JSON by itself.
    """
    try:
        parse_json(line)
    except JSON_ERRORS as error:
        raise ValueError(
            f"{path}: expected one list of records, or one record per line, but the first line is not valid JSON by itself "
            f"({error}): {line[:40].decode(errors='replace')!r}"
        ) from None


def line_records(path: str, lines: Iterable[tuple[int, bytes]], on_malformed: OnMalformed) -> NumberedRecords:
    """Yield (line, object) of numbered JSON lines; blank lines are skipped."""
    for number, line in lines:
        try:
            record = parse_json(line)
        except JSON_ERRORS as error:
            if line.strip():
                on_malformed(Malformed(path, number, f"not valid JSON ({error})"))
            continue
        if isinstance(record, dict):
            yield number, record
        else:
            on_malformed(Malformed(path, number, f"expected a JSON object, found {type(record).__name__}"))


def list_records(path: str, data: bytes, on_malformed: OnMalformed) -> NumberedRecords:
    """Yield (number, object) of a JSON list.

    Raises:
        ValueError: if it is not valid.
    """
    try:
        records = parse_json(data)
    except JSON_ERRORS as error:
        raise ValueError(f"{path}: begins like a list of records, but is not valid JSON ({error})") from None
    for number, record in enumerate(records, start=1):
        if isinstance(record, dict):
            yield number, record
        else:
            on_malformed(Malformed(path, number, f"expected a JSON object, found {type(record).__name__}"))


def read_parquet(path: str, on_malformed: OnMalformed = raise_malformed, digest=None) -> NumberedRecords:
    """Yield (row, record) of a Parquet file; one batch of rows is in memory at a time.

    Raises:
        ValueError: if the file is damaged or not a Parquet file.
    """
    number = 0
    try:
        with fsspec.open(path, "rb", expand=False) as file:
            if digest is not None:  # Parquet is not read from begin to end, so this takes a pass of its own
                while data := file.read(BUFFER_BYTES):
                    digest.update(data)
            parquet = pyarrow.parquet.ParquetFile(file)
            groups = range(parquet.num_row_groups)  # an iterator over all of them would keep the bytes of those already read
            iterators = (parquet.iter_batches(ROWS_PER_GROUP, row_groups=[group]) for group in groups)
            for batch in chain.from_iterable(iterators):
                for row in range(batch.num_rows):
                    number += 1
                    try:
                        (record,) = batch.slice(row, 1).to_pylist()
                    except UnicodeDecodeError as error:
                        on_malformed(Malformed(path, number, f"not valid UTF-8 ({error.reason} at byte {error.start})"))
                    else:
                        yield number, record
    except READ_ERRORS as error:
        raise ValueError(f"{path}: the file is damaged, truncated or cannot be read ({error})") from None


def read_text(path: str, on_malformed: OnMalformed, digest=None) -> NumberedRecords:
    """Yield a plain text file as one record with its text in the field ``text``."""
    with open_text(path, digest) as file:
        data = file.read()
    try:
        yield 1, {"text": data.decode("utf-8")}
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        on_malformed(Malformed(path, line, f"not valid UTF-8 ({error.reason} at byte {error.start})"))


READERS: dict[str, Callable[..., NumberedRecords]] = {
    ".jsonl": read_json,
    ".json": read_json,
    ".parquet": read_parquet,
    ".txt": read_text,
}


def read_records(path: str, on_malformed: OnMalformed = raise_malformed, digest=None) -> NumberedRecords:
    """Yield (line or row, record) of one file, in the order of the file.

    Args:
        path: a file of a known format, without wildcards.
        on_malformed: called with each malformed record; by default it raises an error.
        digest: hash object of ``hashlib`` that is updated with all bytes of the file.

    Raises:
        ValueError: if the format is unknown or the file is damaged.
    """
    return READERS[file_format(path)](path, on_malformed, digest)


def normalized(text: str) -> str:
    """A text with the line ends ``\\n``, instead of ``\\r\\n`` or ``\\r``, and without a byte order mark at its beginning."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.lstrip("\ufeff")


def normalized_record(value: Any) -> Any:
    """A record whose texts are all :func:`normalized`, at any depth."""
    written = orjson.dumps(value, default=str)
    if b"\\r" not in written and BOM_UTF8 not in written:  # tells most records, ten times as fast as looking at each text
        return value
    if isinstance(value, str):
        return normalized(value)
    if isinstance(value, list):
        return [normalized_record(item) for item in value]
    return {key: normalized_record(item) for key, item in value.items()} if isinstance(value, dict) else value


@lru_cache(maxsize=1)  # several fields of a record may be in the same text
def parse_object(text: str) -> dict:
    """An object that is stored as text: as JSON, or as Python writes a dictionary (RedPajama's ``meta`` is published in both
    forms). Other texts give an empty dictionary."""
    if not text.lstrip().startswith("{"):
        return {}
    for parse in (lambda: parse_json(text.encode()), lambda: ast.literal_eval(text.strip())):
        try:
            value = parse()
        except (*JSON_ERRORS, SyntaxError, MemoryError):
            continue
        return value if isinstance(value, dict) else {}
    return {}


def field_getter(field: str) -> Callable[[dict], Any]:
    """Function from a record to the value of a field; None if the record lacks the field. Dots lead into nested objects, which
    may be stored as text."""
    *outer, last = field.split(".")

    def get(record: dict) -> Any:
        for key in outer:
            nested = record.get(key)
            if isinstance(nested, str):
                nested = parse_object(nested)
            if not isinstance(nested, dict):
                return None
            record = nested
        return record.get(last)

    return get


def read_documents(
    path: str,
    fields: Fields = Fields(),
    name: str | None = None,
    on_malformed: OnMalformed = raise_malformed,
    digest=None,
) -> Iterator[Document]:
    """Yield the documents of one file, in the order of the file.

    Args:
        path: see :func:`read_records`.
        fields: names of a record's fields; a plain text file has its text only.
        name: source of the documents whose record names none; by default the path.
        on_malformed: called with each malformed record, which includes those whose text is missing, empty, or has a NUL
            character.
        digest: hash object of ``hashlib`` that is updated with all bytes of the file.

    Raises:
        ValueError: see :func:`read_records`.
    """
    plain = file_format(path) == ".txt"
    text_of, source_of = field_getter("text" if plain else fields.text), field_getter(fields.source)
    metadata = {field: field_getter(field) for field in fields.metadata}
    for line, record in read_records(path, on_malformed, digest):
        text = text_of(record)
        if not isinstance(text, str):
            reason = f"no text in the field {fields.text!r}; the record's fields are {', '.join(record) or 'none'}"
            on_malformed(Malformed(path, line, reason))
            continue
        text = normalized(text)
        if not text or text.isspace():
            on_malformed(Malformed(path, line, "empty text"))
        elif "\0" in text:
            on_malformed(Malformed(path, line, f"NUL character in the text, at character {text.index(chr(0))}"))
        else:
            kept = {field: get(record) for field, get in metadata.items()} if metadata else {}
            source = source_of(record)
            source = name or path if source in (None, "", [], {}) else source  # 0 is the name of a subset too
            yield Document(text, str(source), kept, path, line)


def write_parquet(path: str, schema: pyarrow.Schema, rows: Iterable[dict], rows_per_group: int = ROWS_PER_GROUP) -> None:
    """Write the columns of a schema as a Parquet file; ``rows_per_group`` rows are in memory at a time."""
    rows = iter(rows)
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        while group := list(islice(rows, rows_per_group)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))
