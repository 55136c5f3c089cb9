"""Shortening of conversations that are too long: their documents are cut at sentences, question and answer are kept whole."""

import re
from bisect import bisect, bisect_left
from collections.abc import Iterator
from dataclasses import replace
from operator import itemgetter
from typing import NamedTuple

from longqlora.data.chat_template import count_conversation_tokens
from longqlora.data.instruction_schemas import Conversation

SENTENCE_END = re.compile(r"[.!?…。！？][\"'”’)\]]*(?:\s+|$)|\n\s*\n")

Span = tuple[int, int]  # (begin, end) in characters


def count_tokens(tokenizer, conversations: list[Conversation]) -> list[int]:
    """Number of tokens of each conversation in the chat template."""
    return count_conversation_tokens(tokenizer, [conversation.messages() for conversation in conversations])


def sentence_boundaries(document: str) -> list[int]:
    """Positions between the sentences of a document, with its begin and end."""
    return [0, *(match.end() for match in SENTENCE_END.finditer(document)), len(document)]


def evidence_sentences(document: str, evidence: str, boundaries: list[int]) -> Span:
    """The sentences that contain the evidence; (0, 0) if there is none in the document."""
    begin = document.find(evidence) if evidence else -1
    if begin < 0:
        return 0, 0
    return boundaries[bisect(boundaries, begin) - 1], boundaries[bisect_left(boundaries, begin + len(evidence))]


def sentences_within(boundaries: list[int], span: Span) -> Span:
    """The whole sentences inside a span; an empty span if there are none."""
    begin, end = span
    inside = boundaries[bisect_left(boundaries, begin) : bisect(boundaries, end)]
    return (inside[0], inside[-1]) if inside else (begin, begin)


def token_window(offsets: list[Span], num_tokens: int, evidence: Span) -> Span:
    """Part of a document with ``num_tokens`` tokens: its beginning, or a part around the evidence if that is further behind.

    Args:
        offsets: begin and end of each token of the document.
        num_tokens: from 1 to the number of tokens of the document.
        evidence: the characters to include.
    """
    begin, end = evidence
    if end <= offsets[num_tokens - 1][1]:
        return 0, offsets[num_tokens - 1][1]
    center = (bisect(offsets, begin, key=itemgetter(0)) - 1 + bisect(offsets, end, key=itemgetter(0))) // 2
    first = max(0, min(center - num_tokens // 2, len(offsets) - num_tokens))
    return offsets[first][0], offsets[first + num_tokens - 1][1]


class Document(NamedTuple):
    """A document that can be cut: its text, the positions between its sentences, the characters of each token, and the
    characters to keep."""

    text: str
    boundaries: list[int]
    offsets: list[Span]
    evidence: Span


def find_document(text: str, tokenizer, evidence: str) -> Document:
    """A document with its sentences, its tokens, and the sentences that contain the evidence."""
    boundaries = sentence_boundaries(text)
    settings = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True, "verbose": False}
    offsets = tokenizer(text, **settings)["offset_mapping"]
    return Document(text, boundaries, offsets, evidence_sentences(text, evidence, boundaries))


def cut(document: Document, num_tokens: int) -> str:
    """The sentences of a document that have at most ``num_tokens`` tokens; empty if none would be left, or not the evidence."""
    if num_tokens <= 0:
        return ""
    window = token_window(document.offsets, num_tokens, document.evidence)
    first, last = sentences_within(document.boundaries, window)
    has_evidence = first <= document.evidence[0] <= document.evidence[1] <= last
    return document.text[first:last].strip() if has_evidence else ""


def put_in(question: str, spans: tuple[Span, ...], texts: list[str]) -> str:
    """A question with other texts in place of the spans."""
    ends = [0, *(end for _, end in spans)]
    before = [question[end:begin] for end, (begin, _) in zip(ends, spans, strict=False)]
    return "".join(part for pair in zip(before, texts, strict=True) for part in pair) + question[ends[-1] :]


def shorten_all(conversations: list[Conversation], tokenizer, max_tokens: int) -> Iterator[tuple[Conversation, int] | None]:
    """Yield each conversation as :func:`shorten` does; the tokens of all are counted together."""
    for conversation, num_tokens in zip(conversations, count_tokens(tokenizer, conversations), strict=True):
        yield shorten(conversation, num_tokens, tokenizer, max_tokens)


def shorten(conversation: Conversation, num_tokens: int, tokenizer, max_tokens: int) -> tuple[Conversation, int] | None:
    """Cut the documents of a conversation, at sentences, so that the conversation has at most ``max_tokens`` tokens.

    The beginning of a document is kept. If this would lose the evidence of the answer, a part around the evidence is kept. Of
    several documents, each keeps the same share of its tokens.

    Args:
        conversation: with its documents.
        num_tokens: of the conversation.
        tokenizer: counts the tokens of what is left.
        max_tokens: of the result.

    Returns:
        The conversation and its number of tokens; None if it does not fit: it has no document, or nothing of a document with
        the evidence would be left.
    """
    if num_tokens <= max_tokens:
        return conversation, num_tokens
    if not conversation.documents:
        return None
    (question, answer), *others = conversation.turns
    documents = [find_document(question[begin:end], tokenizer, conversation.evidence) for begin, end in conversation.documents]
    kept_tokens = all_tokens = sum(len(document.offsets) for document in documents)
    shortened = conversation
    while num_tokens > max_tokens:
        kept_tokens -= num_tokens - max_tokens
        kept = [cut(document, kept_tokens * len(document.offsets) // max(1, all_tokens)) for document in documents]
        if not all(kept):
            return None
        turns = [(put_in(question, conversation.documents, kept), answer), *others]
        shortened = replace(conversation, turns=turns, documents=())
        (num_tokens,) = count_tokens(tokenizer, [shortened])
    return shortened, num_tokens
