"""Documents in the formats that corpora are published in, read one at a time.

JSON lines (``.jsonl``, plain or compressed: ``.gz``, ``.zst``, ``.bz2``, ``.xz``), Parquet, and plain text (one document a
file). Paths are whatever ``fsspec`` opens: local files, ``hf://datasets/…``, ``s3://…``, with wildcards or without.

A record that cannot be used is *malformed*: it is handed to the caller with its place and the reason, never skipped. A file
that breaks off or cannot be opened is an error at once, because nobody can say how much of it is missing.
"""

import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, NoReturn

import fsspec
import orjson
import pyarrow
import pyarrow.parquet
import xxhash
from fsspec.compression import compr
from fsspec.utils import infer_compression

if sys.version_info >= (3, 14):
    from compression.zstd import ZstdError
else:
    from backports.zstd import ZstdError  # fsspec reads .zst with it too; the package zstandard takes a torn file for whole

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
FORMATS = (".jsonl", ".json", ".parquet", ".txt")
DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError, ZstdError, pyarrow.ArrowInvalid)
SHOWN = 20  # malformed records of a file that are remembered
BUFFER_BYTES = 2**20  # a line of a long text takes one read, not dozens
ROWS_PER_GROUP = 64  # of a Parquet file; what is in memory when it is written or read


class Document(NamedTuple):
    """A text, the name of where it came from, what else is kept of its record, and its place: file, and line or row."""

    text: str
    source: str
    metadata: dict
    path: str
    line: int


class Malformed(NamedTuple):
    """A record that cannot be used: file, line (or row), and why."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}, line {self.line}: {self.reason}"


@dataclass(frozen=True)
class Fields:
    """The names of a record's fields; dots lead into nested objects (``meta.source``).

    Attributes:
        text: holds the text.
        source: names the subset that the text is of.
        metadata: further fields to keep.
    """

    text: str = "text"
    source: str = "meta.source"
    metadata: tuple[str, ...] = ()


def refuse(malformed: Malformed) -> NoReturn:
    """What is done with a malformed record where none is tolerated.

    Raises:
        ValueError: always; the message names file and line.
    """
    raise ValueError(str(malformed))


class MalformedRecords:
    """Counts malformed records beside those that are read, and remembers the first ones."""

    def __init__(self):
        self.read, self.count, self.examples = 0, 0, []

    def __call__(self, malformed: Malformed) -> None:
        self.count += 1
        if len(self.examples) < SHOWN:
            self.examples.append(str(malformed))
        if self.count >= 100:
            self.check_form()

    def check_form(self) -> None:
        """Stop early where records are not damaged but of another form than expected.

        Raises:
            ValueError: if more records are malformed than not.
        """
        if self.count > self.read:
            raise ValueError(
                f"{self.count} of {self.read + self.count} records are malformed: is the file of another form, or text_field "
                f"another? The first: {self.examples[0]}"
            )


def check_malformed(count: int, documents: int, examples: list[str], max_share: float) -> None:
    """Make sure that no more than a tolerated share of all records is malformed.

    Raises:
        ValueError: if there are more; the message shows the first ones.
    """
    share = count / max(1, count + documents)
    if share > max_share:
        shown = "\n".join(f"  {example}" for example in examples[:5])
        raise ValueError(
            f"{count} of {count + documents} records are malformed ({share:.2%}), max_malformed_share allows "
            f"{max_share:.2%}:\n{shown}"
        )


def file_format(path: str) -> str:
    """The format of a file by its name, its compression taken off.

    Raises:
        ValueError: if the name ends in no known format.
    """
    name = path
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    for suffix in FORMATS:
        if name.endswith(suffix):
            return suffix
    raise ValueError(f"{path}: unknown format; known are {', '.join(FORMATS)}, compressed or not ({', '.join(COMPRESSIONS)})")


def find_files(path: str, part: tuple[int, int] = (0, 1)) -> list[str]:
    """The files that a path names: itself, or what its wildcards match, sorted by name, wherever they lie.

    Args:
        part: (number, of how many): of the matches, which share is asked for.

    Raises:
        ValueError: if nothing matches.
    """
    if not any(character in path for character in "*?["):
        return [path]
    filesystem, pattern = fsspec.url_to_fs(path)
    found = [filesystem.unstrip_protocol(name) for name in sorted(filesystem.glob(pattern))]
    if not found:
        raise ValueError(f"{path}: no such file")
    return found[part[0] :: part[1]]


class Digesting(io.RawIOBase):
    """A file that feeds all that is read of it to a digest, if there is one."""

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
def open_binary(path: str, digest=None):
    """Open a file for reading in bytes, decompressed by its name; ``digest`` (of ``hashlib``) gets the bytes as stored.

    Raises:
        ValueError: where the file cannot be opened or breaks off.
    """
    compression = infer_compression(path)
    try:
        with fsspec.open(path, "rb") as stored:
            stored = io.BufferedReader(Digesting(stored, digest), BUFFER_BYTES)
            if compression and not stored.peek(1):  # gzip takes it for a whole file with nothing in it
                raise EOFError("it has no bytes")
            with compr[compression](stored, mode="rb") as file, io.BufferedReader(file, BUFFER_BYTES) as buffered:
                yield buffered
    except DAMAGED as error:
        raise ValueError(
            f"{path}: the file is damaged, breaks off or cannot be read ({error or type(error).__name__})"
        ) from None


def read_json_lines(path: str, reject: Callable[[Malformed], None], digest=None) -> Iterator[tuple[int, dict]]:
    """Yield (line, object) of a JSON-lines file; blank lines hold nothing and are passed over."""
    with open_binary(path, digest) as file:
        for number, line in enumerate(file, start=1):
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                if line.strip():
                    reject(Malformed(path, number, f"not valid JSON ({error})"))
                continue
            if isinstance(record, dict):
                yield number, record
            else:
                reject(Malformed(path, number, f"expected a JSON object, found {type(record).__name__}"))


def read_json_list(path: str, reject: Callable[[Malformed], None], digest=None) -> Iterator[tuple[int, dict]]:
    """Yield (number, object) of a JSON file that holds one list; the file is in memory as a whole.

    Raises:
        ValueError: if it is something else than a list.
    """
    with open_binary(path, digest) as file:
        try:
            records = orjson.loads(file.read())
        except orjson.JSONDecodeError as error:
            raise ValueError(
                f"{path}: not valid JSON ({error}); a .json file holds one list, JSON lines are named .jsonl"
            ) from None
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected one list of records, found {type(records).__name__}; JSON lines are named .jsonl")
    for number, record in enumerate(records, start=1):
        if isinstance(record, dict):
            yield number, record
        else:
            reject(Malformed(path, number, f"expected a JSON object, found {type(record).__name__}"))


def read_parquet(path: str, reject: Callable[[Malformed], None] = refuse, digest=None) -> Iterator[tuple[int, dict]]:
    """Yield (row, record) of a Parquet file, a batch of rows in memory at a time.

    Raises:
        ValueError: if the file is damaged or no Parquet file.
    """
    number = 0
    try:
        with fsspec.open(path, "rb") as file:
            if digest is not None:  # the reader jumps about in the file, so it is read once more for this
                while data := file.read(BUFFER_BYTES):
                    digest.update(data)
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=ROWS_PER_GROUP):
                for row in range(batch.num_rows):
                    number += 1
                    try:
                        (record,) = batch.slice(row, 1).to_pylist()
                    except UnicodeDecodeError as error:
                        reject(Malformed(path, number, f"not valid UTF-8 ({error.reason} at byte {error.start})"))
                    else:
                        yield number, record
    except DAMAGED as error:
        raise ValueError(f"{path}: damaged, broken off or not readable ({error})") from None


def read_text(path: str, reject: Callable[[Malformed], None], digest=None) -> Iterator[tuple[int, dict]]:
    """Yield a plain text file as one record, its text under ``text``."""
    with open_binary(path, digest) as file:
        data = file.read()
    try:
        yield 1, {"text": data.decode("utf-8")}
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        reject(Malformed(path, line, f"not valid UTF-8 ({error.reason} at byte {error.start})"))


READERS = {".jsonl": read_json_lines, ".json": read_json_list, ".parquet": read_parquet, ".txt": read_text}


def read_records(path: str, reject: Callable[[Malformed], None] = refuse, digest=None) -> Iterator[tuple[int, dict]]:
    """Yield (line or row, record) of one file in its order.

    Args:
        path: a file of a known format, without wildcards.
        reject: is called with each malformed record; by default it is an error.
        digest: of ``hashlib``; gets all bytes of the file.

    Raises:
        ValueError: if the format is unknown, or the file is damaged.
    """
    return READERS[file_format(path)](path, reject, digest)


def getter(field: str) -> Callable[[dict], object]:
    """A function from a record to what stands under a field, dots leading into nested objects; None where nothing does."""
    *outer, last = field.split(".")

    def get(record: dict) -> object:
        for key in outer:
            record = record.get(key)
            if not isinstance(record, dict):
                return None
        return record.get(last)

    return get


def read_documents(
    path: str,
    fields: Fields = Fields(),
    name: str | None = None,
    reject: Callable[[Malformed], None] = refuse,
    digest=None,
) -> Iterator[Document]:
    """Yield the documents of one file in its order.

    Args:
        path: see :func:`read_records`.
        fields: where a record holds its text, its source and what else is kept; a plain text file has the text alone.
        name: the source of documents that name none; by default the file.
        reject: is called with each malformed record (also without a text, empty, or with a NUL character).
        digest: of ``hashlib``; gets all bytes of the file.

    Raises:
        ValueError: see :func:`read_records`.
    """
    plain = file_format(path) == ".txt"
    text_of, source_of, usual = getter("text" if plain else fields.text), getter(fields.source), name or path
    metadata = {field: getter(field) for field in fields.metadata}
    for line, record in read_records(path, reject, digest):
        text = text_of(record)
        if not isinstance(text, str):
            reason = f"no text under {fields.text!r}; the record's fields are {', '.join(record) or 'none'}"
            reject(Malformed(path, line, reason))
        elif not text or text.isspace():
            reject(Malformed(path, line, "empty text"))
        elif "\0" in text:
            reject(Malformed(path, line, f"NUL character in the text, at character {text.index(chr(0))}"))
        else:
            kept = {field: get(record) for field, get in metadata.items()} if metadata else {}
            yield Document(text, str(source_of(record) or usual), kept, path, line)


def text_id(text: str) -> str:
    """Identity of a text: 128 bits of a hash of it, in hexadecimal; equal texts have equal ids."""
    return xxhash.xxh3_128_hexdigest(text.encode())  # every text of a possible length is hashed: ten times as fast as SHA


def write_parquet(path: str, schema: pyarrow.Schema, rows: Iterable[dict], rows_per_group: int = ROWS_PER_GROUP) -> None:
    """Write rows as they come, ``rows_per_group`` in memory at a time."""
    rows = iter(rows)
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        while group := list(islice(rows, rows_per_group)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))
