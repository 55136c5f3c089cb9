"""Documents in the formats that corpora are published in, read one at a time.

JSON lines (``.jsonl``, plain or compressed: ``.gz``, ``.zst``, ``.bz2``, ``.xz``), Parquet, and plain text (one document a
file). Paths are whatever ``fsspec`` opens: local files, ``hf://datasets/…``, ``s3://…``.
"""

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import fsspec
import orjson
import pyarrow.parquet

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
FORMATS = (".jsonl", ".json", ".parquet", ".txt")


@dataclass(frozen=True)
class Document:
    """A text and where it came from; ``id`` is a hash of the text, so equal texts have equal ids."""

    text: str
    source: str

    @property
    def id(self) -> str:
        return hashlib.blake2b(self.text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


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


@contextmanager
def open_binary(path: str):
    """Open a file for reading in bytes, decompressed by its name; buffered, because not every decompressor reads by lines."""
    with fsspec.open(path, "rb", compression="infer") as file, io.BufferedReader(file) as buffered:
        yield buffered


def read_records(path: str) -> Iterator[dict]:
    """Yield the objects of a JSON-lines file, or of a JSON file that holds one list.

    Raises:
        ValueError: on a line that is not a JSON object; the message names the file and the line.
    """
    with open_binary(path) as file:
        if file_format(path) == ".json":
            yield from orjson.loads(file.read())
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    record = orjson.loads(line)
                except orjson.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from None
                if not isinstance(record, dict):
                    raise ValueError(f"{path}, line {number}: expected a JSON object, found {type(record).__name__}")
                yield record


def read_documents(path: str, text_field: str = "text") -> Iterator[Document]:
    """Yield the documents of one file in its order.

    The source of a document is its ``meta.source`` or ``source`` where it has one (RedPajama's subsets), else the file.

    Raises:
        ValueError: if the format is unknown, a line is malformed, or a record has no text under ``text_field``.
    """
    kind = file_format(path)
    if kind == ".txt":
        with open_binary(path) as file:
            yield Document(file.read().decode("utf-8"), path)
        return
    for number, record in enumerate(read_parquet(path) if kind == ".parquet" else read_records(path), start=1):
        text = record.get(text_field)
        if not isinstance(text, str):
            raise ValueError(
                f"{path}, record {number}: no text under {text_field!r}; the record's fields are {', '.join(record)}"
            )
        meta = record.get("meta")
        source = meta.get("source") if isinstance(meta, dict) else record.get("source")
        yield Document(text, str(source or path))


def read_parquet(path: str) -> Iterator[dict]:
    """Yield the rows of a Parquet file, a batch in memory at a time."""
    with fsspec.open(path, "rb") as file:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256):
            yield from batch.to_pylist()
