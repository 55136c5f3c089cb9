"""Shortening of conversations that are too long: the document is cut at sentences, question and answer are kept whole."""

import re
from bisect import bisect, bisect_left
from dataclasses import replace
from operator import itemgetter

from longqlora.data.instruction_schemas import Conversation

SENTENCE_END = re.compile(r"[.!?…。！？][\"'”’)\]]*(?:\s+|$)|\n\s*\n")

Span = tuple[int, int]  # (begin, end) in characters


def count_tokens(tokenizer, conversation: Conversation) -> int:
    """Number of tokens of a conversation in the chat template."""
    return len(tokenizer.apply_chat_template(conversation.messages(), return_dict=True)["input_ids"])


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


def shorten(conversation: Conversation, tokenizer, max_tokens: int) -> tuple[Conversation, int] | None:
    """Cut the document of a conversation, at sentences, so that the conversation has at most ``max_tokens`` tokens.

    The beginning of the document is kept. If this would lose the evidence of the answer, a part around the evidence is kept.

    Returns:
        The conversation and its number of tokens; None if it does not fit: it has no document, or nothing of the document with
        the evidence would be left.
    """
    num_tokens = count_tokens(tokenizer, conversation)
    if num_tokens <= max_tokens:
        return conversation, num_tokens
    if conversation.document is None:
        return None
    (question, answer), *others = conversation.turns
    begin, end = conversation.document
    document = question[begin:end]
    boundaries = sentence_boundaries(document)
    evidence = evidence_sentences(document, conversation.evidence, boundaries)
    offsets = tokenizer(document, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    kept_tokens = len(offsets)
    shortened = conversation
    while num_tokens > max_tokens:
        kept_tokens -= num_tokens - max_tokens
        if kept_tokens <= 0:
            return None
        first, last = sentences_within(boundaries, token_window(offsets, kept_tokens, evidence))
        kept = document[first:last].strip()
        if not kept or not first <= evidence[0] <= evidence[1] <= last:
            return None
        turns = [(question[:begin] + kept + question[end:], answer), *others]
        shortened = replace(conversation, turns=turns, document=None)
        num_tokens = count_tokens(tokenizer, shortened)
    return shortened, num_tokens
