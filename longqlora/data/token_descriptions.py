"""What is known of a token file without numpy: its description, its size and its largest id.

Standard library only: the workflow checks local token files on every start.
"""

import json
import sys
from array import array
from pathlib import Path

BYTES_PER_ID = {"uint16": 2, "uint32": 4}
TYPECODES = {"uint16": "H", "uint32": "I"}  # of array
BYTES_PER_READ = 2**24


def description_path(path: str | Path) -> Path:
    """Where the description of a token file lies: ``corpus.bin`` → ``corpus.json``."""
    return Path(path).with_suffix(".json")


def read_description(path: str | Path) -> dict:
    """What is known of a token file; one with no description beside it is a single document in LongLoRA's uint16."""
    described = description_path(path)
    if described.exists():
        return json.loads(described.read_text())
    return {"dtype": "uint16", "document_ends": [Path(path).stat().st_size // 2]}


def check_size(path: str | Path) -> str:
    """The type of a token file's ids: that of the description beside it, LongLoRA's uint16 without one.

    Raises:
        ValueError: if the file is empty, no whole number of ids, or not as long as its description says.
    """
    description = read_description(path)
    dtype, num_bytes = description["dtype"], Path(path).stat().st_size
    if num_bytes == 0:
        raise ValueError(f"{path}: the file is empty, expected a stream of {dtype} token ids")
    if num_bytes % BYTES_PER_ID[dtype]:
        raise ValueError(
            f"{path}: {num_bytes} bytes are not a stream of {dtype} token ids, {BYTES_PER_ID[dtype]} bytes each; "
            "it is cut off, or no file of token ids"
        )
    num_tokens = num_bytes // BYTES_PER_ID[dtype]
    if num_tokens != description.get("num_tokens", num_tokens):
        raise ValueError(f"{path}: {num_tokens} tokens, where {description_path(path)} says {description['num_tokens']}")
    return dtype


def largest_token(path: str | Path) -> int:
    """The largest id of a token file, read a part at a time.

    Raises:
        ValueError: see :func:`check_size`.
    """
    typecode, largest = TYPECODES[check_size(path)], 0
    with open(path, "rb") as file:
        while part := file.read(BYTES_PER_READ):
            ids = array(typecode, part)
            if sys.byteorder == "big":  # the ids are little-endian
                ids.byteswap()
            largest = max(largest, max(ids))
    return largest
