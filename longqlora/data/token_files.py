"""Token ids on disk: a flat little-endian stream in a ``.bin`` file, what is known of it in a ``.json`` beside it.

LongLoRA's evaluation files are the ``.bin`` alone, in uint16. The file beside it adds what the stream cannot say: the type
of the ids, the size of the vocabulary, and where each document ends.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy

from longqlora.data.token_descriptions import check_size, description_path

DTYPES = {"uint16": numpy.dtype("<u2"), "uint32": numpy.dtype("<u4")}
IGNORED = -100  # label of a token that is not learned
CHARACTERS_PER_BATCH = 500_000  # encoded at once: some texts for every core, and tens of megabytes of memory meanwhile


def batches(items: Iterable, text_of: Callable[[object], str] = lambda item: item) -> Iterator[list]:
    """Cut a stream of items into lists whose texts have about ``CHARACTERS_PER_BATCH`` together."""
    batch, characters = [], 0
    for item in items:
        batch.append(item)
        characters += len(text_of(item))
        if characters >= CHARACTERS_PER_BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def backend_of(tokenizer):
    """The ``tokenizers.Tokenizer`` behind a tokenizer of transformers.

    Raises:
        ValueError: if there is none.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{tokenizer.name_or_path}: the tokenizer has no tokenizer.json, only a slow implementation in Python")
    return tokenizer.backend_tokenizer


def encode_batch(tokenizer, texts: list[str]) -> list:
    """Encode texts at once on all cores, without special tokens: the end-of-text token spelt out in a text is text as well.

    Returns:
        For each text something that has its ids as ``ids`` and their number as its length.
    """
    backend = backend_of(tokenizer)  # transformers' own call would copy all ids into Python lists, and more
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend.encode_batch_fast(texts, add_special_tokens=False)


def encode(tokenizer, texts: Iterable[str]) -> Iterator[list[int]]:
    """Yield the token ids of each text, without special tokens, a batch of texts at a time."""
    for batch in batches(texts):
        for encoding in encode_batch(tokenizer, batch):
            yield encoding.ids


def write_tokens(path: str | Path, documents: Iterable[list[int]], *, vocab_size: int, eos_token_id: int) -> dict:
    """Write documents as one stream, each followed by the end-of-text token, and the description beside it.

    Args:
        path: of the ``.bin`` file.
        documents: token ids of each document.
        vocab_size: of the tokenizer; ids are uint16 where they fit, else uint32.
        eos_token_id: ends every document.

    Returns:
        The description: dtype, vocab_size, num_tokens, document_ends (index after each document's end-of-text token).

    Raises:
        ValueError: if there is no document at all.
    """
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    num_tokens, document_ends = 0, []
    with open(path, "wb") as file:
        for ids in documents:
            file.write(numpy.asarray([*ids, eos_token_id], dtype=DTYPES[dtype]))
            num_tokens += len(ids) + 1
            document_ends.append(num_tokens)
    if not document_ends:
        raise ValueError(f"{path}: no document to write")
    description = {"dtype": dtype, "vocab_size": vocab_size, "num_tokens": num_tokens, "document_ends": document_ends}
    description_path(path).write_text(json.dumps(description))
    return description


def read_tokens(path: str | Path) -> numpy.ndarray:
    """Map a token file into memory: ``[num_tokens]``, read-only.

    The type of the ids is that of the description beside the file; a file without one is taken for LongLoRA's uint16.

    Raises:
        ValueError: if the file is empty, no whole number of ids, or not as long as its description says.
    """
    return numpy.memmap(path, dtype=DTYPES[check_size(path)], mode="r")


def check_vocabulary(path: str | Path, vocab_size: int) -> None:
    """Raise ValueError if the token file holds an id that the model's vocabulary of ``vocab_size`` does not have."""
    largest = int(read_tokens(path).max())
    if largest >= vocab_size:
        raise ValueError(
            f"{path}: holds token id {largest}, but the tokenizer's vocabulary ends at {vocab_size - 1}; "
            "the file was made with another tokenizer"
        )


def tokenize_documents(texts: Iterable[str], tokenizer, output: str) -> dict:
    """Encode texts one after the other and write them by :func:`write_tokens`; return the description."""
    return write_tokens(output, encode(tokenizer, texts), vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
