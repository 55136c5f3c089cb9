"""Token files: a flat little-endian stream of token ids in a ``.bin`` file, and its description in a ``.json`` file next to it.

LongLoRA publishes its evaluation sets as ``.bin`` files of uint16 ids without a description. The description adds the type of
the ids, the size of the vocabulary, the largest id, and where each document ends.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy
from tokenizers import Encoding, Tokenizer

from longqlora.data.token_descriptions import description_path, largest_token, read_checked_description

DTYPES: dict[str, numpy.dtype] = {"uint16": numpy.dtype("<u2"), "uint32": numpy.dtype("<u4")}
IGNORED = -100  # label of a token that the loss does not cover
CHARACTERS_PER_BATCH = 500_000  # encoded at once: enough texts for every core, and only tens of megabytes of memory

Item = TypeVar("Item")


def batches(items: Iterable[Item], text_of: Callable[[Item], str] = str) -> Iterator[list[Item]]:
    """Yield the items in batches whose texts have about ``CHARACTERS_PER_BATCH`` characters together."""
    batch: list[Item] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += len(text_of(item))
        if characters >= CHARACTERS_PER_BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def backend_of(tokenizer) -> Tokenizer:
    """The ``tokenizers.Tokenizer`` inside a tokenizer of transformers.

    Raises:
        ValueError: if it is a slow tokenizer, implemented in Python.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{tokenizer.name_or_path}: the tokenizer has no tokenizer.json, only a slow implementation in Python")
    return tokenizer.backend_tokenizer


def encode_batch(tokenizer, texts: list[str]) -> list[Encoding]:
    """Encode texts together on all cores. Special tokens are not added, and those that a text spells out are encoded as text.

    Returns:
        An encoding per text, with its token ids in ``ids`` and their number as its length.
    """
    backend = backend_of(tokenizer)  # calling transformers' tokenizer would copy all ids into Python lists, and more
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend.encode_batch_fast(texts, add_special_tokens=False)


def encode(tokenizer, texts: Iterable[str]) -> Iterator[list[int]]:
    """Yield the token ids of each text, without special tokens; one batch of texts is in memory at a time."""
    for batch in batches(texts):
        for encoding in encode_batch(tokenizer, batch):
            yield encoding.ids


def write_tokens(path: str | Path, documents: Iterable[list[int]], *, vocab_size: int, eos_token_id: int) -> dict:
    """Write documents as one stream with the end-of-text token after each, and the description next to it.

    Args:
        path: of the ``.bin`` file.
        documents: token ids of each document.
        vocab_size: of the tokenizer; ids are stored as uint16 if they fit, else as uint32.
        eos_token_id: id of the end-of-text token.

    Returns:
        The description: dtype, vocab_size, num_tokens, max_token_id, document_ends (index after the end-of-text token of each
        document).

    Raises:
        ValueError: if there is no document.
    """
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    num_tokens, max_token_id, document_ends = 0, 0, []
    with open(path, "wb") as file:
        for ids in documents:
            tokens = numpy.asarray([*ids, eos_token_id], dtype=DTYPES[dtype])
            file.write(tokens.tobytes())
            num_tokens += len(tokens)
            max_token_id = max(max_token_id, int(tokens.max()))
            document_ends.append(num_tokens)
    if not document_ends:
        raise ValueError(f"{path}: there is no document to write")
    description = {
        "dtype": dtype,
        "vocab_size": vocab_size,
        "num_tokens": num_tokens,
        "max_token_id": max_token_id,
        "document_ends": document_ends,
    }
    description_path(path).write_text(json.dumps(description), encoding="utf-8")
    return description


def read_tokens(path: str | Path) -> numpy.ndarray:
    """Map a token file into memory: ``[num_tokens]``, read-only, of the type that its description says (uint16 without one).

    Raises:
        ValueError: see :func:`longqlora.data.token_descriptions.read_checked_description`.
    """
    return numpy.memmap(path, dtype=DTYPES[read_checked_description(path)["dtype"]], mode="r")


def check_vocabulary(path: str | Path, vocab_size: int, owner: str = "the tokenizer") -> int:
    """Check that a token file holds only ids below ``vocab_size``.

    Args:
        path: of the ``.bin`` file.
        vocab_size: number of tokens of the tokenizer or model that is going to read it.
        owner: that tokenizer or model, for the message.

    Returns:
        The largest id.

    Raises:
        ValueError: if it holds a larger id.
    """
    largest = largest_token(path)
    check_token(str(path), largest, vocab_size, owner)
    return largest


def check_token(what: str, largest: int, vocab_size: int, owner: str) -> None:
    """Check that the largest id of some tokens is below the size of a vocabulary.

    Args:
        what: holds the tokens, for the message.
        largest: id of a token.
        vocab_size, owner: see :func:`check_vocabulary`.

    Raises:
        ValueError: if it is not.
    """
    if largest >= vocab_size:
        raise ValueError(
            f"{what}: holds token id {largest}, but the vocabulary of {owner} ends at {vocab_size - 1}; "
            "its tokens are of another tokenizer, or of one with more tokens than the model has embeddings"
        )


def tokenize_documents(texts: Iterable[str], tokenizer, output: str) -> dict:
    """Encode texts one after the other, write them with :func:`write_tokens`, and return the description."""
    return write_tokens(output, encode(tokenizer, texts), vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
