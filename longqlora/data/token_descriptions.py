"""Descriptions of token files: the JSON file next to a ``.bin`` file, and what can be checked with it.

This module uses the standard library only, because the workflow checks local token files every time it starts.
"""

import json
import sys
from array import array
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

BYTES_PER_ID = {"uint16": 2, "uint32": 4}
TYPECODES = {"uint16": "H", "uint32": "I"}  # of array.array
BYTES_PER_READ = 2**24


def description_path(path: str | Path) -> Path:
    """Path of a token file's description: ``corpus.bin`` → ``corpus.json``."""
    return Path(path).with_suffix(".json")


def read_description(path: str | Path) -> dict:
    """Description of a token file. A file without one is read like LongLoRA's: one document of uint16 ids.

    Raises:
        ValueError: if a file of that name is something else than a description.
    """
    described = description_path(path)
    if described.exists():
        try:
            description = json.loads(described.read_text(encoding="utf-8"))
            ends, dtype = description["document_ends"], description["dtype"]
            if dtype in BYTES_PER_ID and isinstance(ends, list) and ends:
                return description
        except (ValueError, KeyError, TypeError):
            pass
        raise ValueError(f"{described}: does not describe {path} (dtype {' or '.join(BYTES_PER_ID)}, document_ends); rename it")
    return {"dtype": "uint16", "document_ends": [Path(path).stat().st_size // 2]}


def document_spans(ends: list[int]) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of each document of a token stream.

    Args:
        ends: index after the last token of each document, ascending.
    """
    return pairwise([0, *ends])


def read_checked_description(path: str | Path) -> dict:
    """Description of a token file, after the size of the file is compared with it.

    Raises:
        ValueError: if the file is empty, its size is not a multiple of the size of an id, or it has another number of tokens
            than the description says.
    """
    description = read_description(path)
    dtype, num_bytes = description["dtype"], Path(path).stat().st_size
    if num_bytes == 0:
        raise ValueError(f"{path}: the file is empty, expected a stream of {dtype} token ids")
    if num_bytes % BYTES_PER_ID[dtype]:
        raise ValueError(
            f"{path}: {num_bytes} bytes are not a stream of {dtype} token ids of {BYTES_PER_ID[dtype]} bytes each; "
            "the file is truncated, or it does not hold token ids"
        )
    num_tokens = num_bytes // BYTES_PER_ID[dtype]
    if num_tokens != description.get("num_tokens", num_tokens):
        raise ValueError(f"{path}: has {num_tokens} tokens, but {description_path(path)} says {description['num_tokens']}")
    return description


def largest_token(path: str | Path) -> int:
    """Largest id in a token file: from its description, or else from one pass over the file.

    Raises:
        ValueError: see :func:`read_checked_description`.
    """
    description = read_checked_description(path)
    if "max_token_id" in description:
        return description["max_token_id"]
    largest = 0
    with open(path, "rb") as file:
        while part := file.read(BYTES_PER_READ):
            ids = array(TYPECODES[description["dtype"]], part)
            if sys.byteorder == "big":  # the ids are little-endian
                ids.byteswap()
            largest = max(largest, max(ids))
    return largest
