"""The instruction set of supervised fine-tuning: a sample of several sources in given shares, and its tokens.

A record that is too long loses the end of its document, at a sentence; question and answer are always kept whole.
"""

import heapq
import logging
import re
from bisect import bisect, bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from itertools import islice
from operator import itemgetter
from pathlib import Path

import orjson
import pandas
import pyarrow
import pyarrow.parquet

from longqlora.data.chat_template import tokenize_conversation, with_chat_template
from longqlora.data.decontamination import EvaluationNgrams, Overlap
from longqlora.data.instruction_schemas import Conversation, read_conversations
from longqlora.data.readers import MalformedRecords, check_malformed, find_files, read_parquet, text_id, write_parquet
from longqlora.data.sampling import BottomK, apportion, priority
from longqlora.data.token_files import IGNORED

log = logging.getLogger(__name__)

SENTENCE_END = re.compile(r"[.!?…。！？][\"'”’)\]]*(?:\s+|$)|\n\s*\n")
MESSAGES = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))
RECORDS = pyarrow.schema(
    [("source", "string"), ("id", "string"), ("num_tokens", "int64"), ("shortened", "bool"), ("messages", MESSAGES)]
)
TOKENS = pyarrow.schema([("input_ids", pyarrow.list_(pyarrow.int32())), ("labels", pyarrow.list_(pyarrow.int32()))])
RECORDS_PER_BATCH = 64  # in memory at once
REMOVED = ["source", "id", *Overlap.__dataclass_fields__]


def count_tokens(tokenizer, conversation: Conversation) -> int:
    """Number of tokens of a conversation in the chat template."""
    return len(tokenize_conversation(tokenizer, conversation.messages())[0])


def whole_sentences(boundaries: list[int], begin: int, end: int) -> tuple[int, int]:
    """The largest part of ``begin`` to ``end`` that starts and ends at boundaries between sentences."""
    inside = boundaries[bisect_left(boundaries, begin) : bisect(boundaries, end)]
    return (inside[0], inside[-1]) if inside else (begin, begin)


def stretch(offsets: list[tuple[int, int]], room: int, begin: int, end: int) -> tuple[int, int]:
    """Where ``room`` tokens of a document begin and end, in characters: its first ones, or those around the characters
    ``begin`` to ``end`` if these are not among the first.

    Args:
        offsets: begin and end of each token of the document.
        room: how many tokens, from 1 to all.
    """
    if end <= offsets[room - 1][1]:
        return 0, offsets[room - 1][1]
    centre = (bisect(offsets, begin, key=itemgetter(0)) - 1 + bisect(offsets, end, key=itemgetter(0))) // 2
    first = max(0, min(centre - room // 2, len(offsets) - room))
    return offsets[first][0], offsets[first + room - 1][1]


def shorten(conversation: Conversation, tokenizer, max_tokens: int) -> tuple[Conversation, int] | None:
    """Cut the document of a conversation, at sentences, so that the whole has at most ``max_tokens`` tokens.

    The beginning of the document stays; where the evidence of the answer would be lost with its end, a stretch around that.

    Returns:
        The conversation and its number of tokens; None if nothing that fits, and holds the evidence, would be left of it.
    """
    num_tokens = count_tokens(tokenizer, conversation)
    if num_tokens <= max_tokens or conversation.document is None:
        return (conversation, num_tokens) if num_tokens <= max_tokens else None
    (question, answer), *others = conversation.turns
    begin, end = conversation.document
    document = question[begin:end]
    place = document.find(conversation.evidence) if conversation.evidence else -1
    boundaries = [0, *(match.end() for match in SENTENCE_END.finditer(document)), len(document)]
    kept = (0, 0)  # the sentences of the evidence
    if place >= 0:
        after = place + len(conversation.evidence)
        kept = boundaries[bisect(boundaries, place) - 1], boundaries[bisect_left(boundaries, after)]
    offsets = tokenizer(document, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    room = len(offsets)
    while num_tokens > max_tokens:
        room -= num_tokens - max_tokens
        if room <= 0:
            return None
        first, last = whole_sentences(boundaries, *stretch(offsets, room, *kept))
        if not document[first:last].strip() or not first <= kept[0] <= kept[1] <= last:
            return None
        cut = question[:begin] + document[first:last].strip() + question[end:]
        shortened = replace(conversation, turns=[(cut, answer), *others], document=None)
        num_tokens = count_tokens(tokenizer, shortened)
    return shortened, num_tokens


class Source:
    """One source of the set: its usable records of the smallest priorities, and what became of the others.

    Args:
        name: of the source.
        quota: how many records it contributes.
        folder: for temporary files.
    """

    def __init__(self, name: str, quota: int, folder: Path):
        self.name, self.quota, self.best = name, quota, BottomK(quota, folder)
        self.malformed, self.files = MalformedRecords(), []
        self.counts = Counter(dict.fromkeys(["without an answer", "duplicate"], 0))
        self.known: set[int] = set()  # priorities of all conversations so far
        self.unusable: list[tuple[int, str, list[dict]]] = []  # priority, reason, rows of the report on removed records

    def read(self, paths: list[str], schema: str) -> Iterator[Conversation]:
        """Yield the conversations of all records that hold an answer."""
        for path in [file for pattern in paths for file in find_files(pattern)]:
            digest, records = sha256(), self.malformed.read
            for conversation in read_conversations(path, schema, self.malformed, digest):
                self.malformed.read += 1
                if conversation is None:
                    self.counts["without an answer"] += 1
                else:
                    yield conversation
            self.files.append({"path": path, "sha256": digest.hexdigest(), "records": self.malformed.read - records})
            log.info("%s: %d records", path, self.malformed.read - records)
        self.malformed.check_form()

    def draw(self, conversations: Iterator[Conversation], seed: int) -> Iterator[tuple[int, str, Conversation]]:
        """Yield (priority, id, conversation) of those that could still be among the smallest, each once."""
        for conversation in conversations:
            key = text_id(orjson.dumps(conversation.messages()).decode())
            order = priority(key, seed)
            if order in self.known:
                self.counts["duplicate"] += 1
            elif order < self.best.threshold:
                yield order, key, conversation
            self.known.add(order)

    def keep(
        self, drawn: Iterator[tuple[int, str, Conversation]], tokenizer, max_tokens: int, ngrams: EvaluationNgrams
    ) -> None:
        """Keep those that fit, their documents shortened where they must be, and share nothing with an evaluation set."""
        for order, key, conversation in drawn:
            used, num_tokens = shorten(conversation, tokenizer, max_tokens) or (None, 0)
            overlaps = ngrams.overlaps(used.text()) if used else []
            if used is None:
                self.unusable.append((order, "too long", []))
            elif overlaps:
                rows = [{"source": self.name, "id": key, **vars(overlap)} for overlap in overlaps]
                self.unusable.append((order, "contaminated", rows))
            else:
                shortened = used is not conversation
                value = {"source": self.name, "num_tokens": num_tokens, "shortened": shortened, "messages": used.messages()}
                self.best.add(order, key, value)

    def removed(self) -> list[dict]:
        """Rows of the report: contaminated records that would have been drawn."""
        return [row for order, _, rows in self.unusable if order < self.best.threshold for row in rows]

    def card(self) -> dict[str, int]:
        """Number of records by outcome; of those that cannot be used, the ones that would have been drawn."""
        reasons = Counter({"too long": 0, "contaminated": 0})
        reasons.update(reason for order, reason, _ in self.unusable if order < self.best.threshold)
        taken = [value for _, _, value in self.best]
        return {
            "read": self.malformed.read,
            "malformed": self.malformed.count,
            **self.counts,
            **reasons,
            "wanted": self.quota,
            "taken": len(taken),
            "shortened": sum(value["shortened"] for value in taken),
            "tokens": sum(value["num_tokens"] for value in taken),
        }

    def rows(self) -> Iterator[dict]:
        """The records, by priority."""
        for order, key, value in self.best:
            yield {"priority": order, "id": key, **value}


def check_quotas(cards: dict[str, dict], num_records: int, max_tokens: int) -> None:
    """Make sure that every source has its share.

    Raises:
        ValueError: if one has not; the message says which has how many of how many.
    """
    short = [
        f"{name} has {card['taken']} of {card['wanted']}" for name, card in cards.items() if card["taken"] < card["wanted"]
    ]
    if short:
        raise ValueError(
            f"sft.num_records {num_records} of at most {max_tokens} tokens cannot be met: {'; '.join(short)}; "
            "sft.allow_fewer: true would take what there is"
        )


def build_sft_set(
    *,
    sources: list[dict],
    tokenizer,
    num_records: int,
    max_tokens: int,
    seed: int,
    allow_fewer: bool,
    max_malformed_share: float,
    ngrams: EvaluationNgrams,
    output: str,
    removed: str,
) -> dict:
    """Sample the records of every source to its share and write them as Parquet (source, id, num_tokens, shortened, messages).

    Args:
        sources: name, schema, paths and share (of ``num_records``) of each.
        tokenizer: counts the tokens of a conversation in the chat template.
        num_records: size of the set.
        max_tokens: of a record; a longer one is shortened, see :func:`shorten`.
        seed: of the sample (bottom-k by hash, see :mod:`longqlora.data.sampling`).
        allow_fewer: whether fewer records will do where a source does not have its share.
        max_malformed_share: of a source's records, before the run stops.
        ngrams: of the evaluation sets; records that share some are removed.
        output: path of the Parquet file.
        removed: CSV file of the contaminated records.

    Returns:
        The data card: what became of the records of each source.

    Raises:
        ValueError: if a source has too few records for its share (the message says which has how many of how many), or too many
            malformed ones.
    """
    tokenizer = with_chat_template(tokenizer)
    quotas = apportion(num_records, {source["name"]: source["share"] for source in sources})
    drawn = []
    for entry in sources:
        source = Source(entry["name"], quotas[entry["name"]], Path(output).parent)
        conversations = source.read(entry["paths"], entry["schema"])
        source.keep(source.draw(conversations, seed), tokenizer, max_tokens, ngrams)
        check_malformed(source.malformed.count, source.malformed.read, source.malformed.examples, max_malformed_share)
        drawn.append(source)
    cards = {source.name: source.card() for source in drawn}
    if not allow_fewer:
        check_quotas(cards, num_records, max_tokens)
    rows = heapq.merge(*(source.rows() for source in drawn), key=itemgetter("priority"))
    write_parquet(output, RECORDS, ({name: row[name] for name in RECORDS.names} for row in rows))
    report = pandas.DataFrame([row for source in drawn for row in source.removed()], columns=REMOVED)
    report.convert_dtypes().to_csv(removed, index=False)
    return {
        "records": sum(card["taken"] for card in cards.values()),
        "tokens": sum(card["tokens"] for card in cards.values()),
        "sources": cards,
        "malformed": [example for source in drawn for example in source.malformed.examples],
        "settings": {"num_records": num_records, "max_tokens": max_tokens, "seed": seed, "ngram_words": ngrams.n},
        "files": [file for source in drawn for file in source.files],
    }


def tokenize_sft(*, records: str, tokenizer, held_out: int, output: str) -> dict[str, int]:
    """Tokenise an instruction set, a batch in memory at a time, into an Arrow file (``input_ids``, ``labels``) that
    ``datasets`` maps into memory.

    Args:
        records: Parquet file of :func:`build_sft_set`.
        tokenizer: of transformers.
        held_out: how many of the last records are left out; the records are in random order.
        output: path of the Arrow file.

    Returns:
        Number of records, tokens, and tokens that are learned.
    """
    tokenizer, counts = with_chat_template(tokenizer), Counter()
    trained = pyarrow.parquet.read_metadata(records).num_rows - held_out
    encoded = (tokenize_conversation(tokenizer, row["messages"]) for _, row in islice(read_parquet(records), max(0, trained)))
    with pyarrow.OSFile(output, "wb") as file, pyarrow.ipc.new_stream(file, TOKENS) as writer:
        while batch := list(islice(encoded, RECORDS_PER_BATCH)):
            ids, labels = zip(*batch, strict=True)
            writer.write_batch(pyarrow.record_batch([pyarrow.array(ids), pyarrow.array(labels)], schema=TOKENS))
            counts["records"] += len(batch)
            counts["tokens"] += sum(map(len, ids))
            counts["learned"] += sum(label != IGNORED for row in labels for label in row)
    log.info("%(records)d records, %(tokens)d tokens, of which %(learned)d are learned", counts)
    return dict(counts)
