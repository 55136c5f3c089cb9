"""Texts that a user gives, the prompts made of them, and how texts are cut that do not fit into the context."""

import codecs
import logging
from pathlib import Path
from typing import NamedTuple

from longqlora.data.chat_template import tokenize_conversation
from longqlora.data.shortening import cut, find_document

DOCUMENTS_SHARE = 0.75  # of the context that the chat template leaves: what documents that are cut may fill

LARGE_FILE = 5_000_000  # bytes; more than a million tokens, which take seconds to count

Message = dict[str, str]  # role and content

log = logging.getLogger(__name__)


class Document(NamedTuple):
    """A text that a conversation is about, with its name."""

    name: str
    text: str


def read_document(path: str) -> Document:
    """Read a text file.

    Raises:
        ValueError: if it cannot be read, or is not text in UTF-8 or UTF-16.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > LARGE_FILE:
        log.warning("%s: has %d MB; to count its tokens takes a while", path, len(content) // 1_000_000)
    return Document(Path(path).name, decode(content, path))


def decode(content: bytes, name: str) -> str:
    """The text in a file, which is in UTF-16 if it begins as Windows begins such files, and otherwise in UTF-8.

    Raises:
        ValueError: if it is empty, or not such a text.
    """
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = content.decode(encoding).replace("\r\n", "\n").strip()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: is not a text in {encoding.removesuffix('-sig').upper()} "
            f"(byte {error.start:,} is {content[error.start]:#04x}); convert it to plain text"
        ) from None
    if "\0" in text:
        raise ValueError(f"{name}: is a binary file; a plain text is needed")
    if not text:
        raise ValueError(f"{name}: is empty")
    return text


def with_documents(documents: list[Document], messages: list[Message]) -> list[Message]:
    """A conversation whose first question follows the documents, as in the training data; several have their names above."""
    if not documents:
        return messages
    titled = [document.text if len(documents) == 1 else f"{document.name}:\n\n{document.text}" for document in documents]
    first, *others = messages
    return [first | {"content": "\n\n".join([*titled, first["content"]])}, *others]


def chat_prompt(tokenizer, documents: list[Document], messages: list[Message]) -> list[int]:
    """The token ids of a conversation in the tokenizer's chat template, up to the answer that comes next."""
    return tokenize_conversation(tokenizer, with_documents(documents, messages), add_generation_prompt=True)[0]


def count_tokens(tokenizer, text: str) -> int:
    """Number of tokens of a text alone."""
    return len(tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"])


def excess(num_tokens: int, context: int) -> int:
    """By how many tokens a prompt is too long: at least one must be left for the answer."""
    return max(0, num_tokens + 1 - context)


def truncate(text: str, tokenizer, num_tokens: int) -> str:
    """The beginning of a text that has at most ``num_tokens`` tokens, up to the end of a sentence; up to any token if no
    sentence ends before."""
    document = find_document(text, tokenizer, evidence="")
    if len(document.offsets) <= num_tokens:
        return text
    return cut(document, num_tokens) or text[: document.offsets[num_tokens - 1][1]]


def truncate_documents(documents: list[Document], tokenizer, context: int) -> list[Document]:
    """Cut documents so that a quarter of the context that the chat template leaves is free; each keeps the same share of its
    tokens."""
    counts = [count_tokens(tokenizer, document.text) for document in documents]
    template = len(chat_prompt(tokenizer, [], [{"role": "user", "content": ""}]))  # some have a long system message
    share = DOCUMENTS_SHARE * (context - template) / max(1, sum(counts))
    if share >= 1:
        return documents
    return [
        document._replace(text=truncate(document.text, tokenizer, max(1, int(share * count))))
        for document, count in zip(documents, counts, strict=True)
    ]
