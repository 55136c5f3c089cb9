"""The instruction set for supervised fine-tuning: a sample of several sources in given shares, and its tokens.

A record that is too long loses the end of its document; question and answer are always kept whole.
"""

import heapq
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from operator import itemgetter
from pathlib import Path

import orjson
import pandas
import pyarrow
import pyarrow.parquet

from longqlora.config.settings import SftSource
from longqlora.data.chat_template import tokenize_conversations, with_chat_template
from longqlora.data.decontamination import EvaluationNgrams, check_clean
from longqlora.data.instruction_schemas import Conversation, read_conversations, text_of
from longqlora.data.readers import NORMALIZATION, find_files, read_parquet, write_parquet
from longqlora.data.sampling import BottomK, apportion
from longqlora.data.shortening import shorten_all
from longqlora.data.source_pass import OVERLAP_COLUMNS, SourcePass, check_malformed_share
from longqlora.data.token_files import IGNORED, batches

log = logging.getLogger(__name__)

MESSAGE = [("role", pyarrow.string()), ("content", pyarrow.string()), ("learned", pyarrow.bool_())]  # learned: False, or null
MESSAGES = pyarrow.list_(pyarrow.struct(MESSAGE))
RECORDS = pyarrow.schema(
    [("source", "string"), ("id", "string"), ("num_tokens", "int64"), ("shortened", "bool"), ("messages", MESSAGES)]
)
TOKENS = pyarrow.schema([("input_ids", pyarrow.list_(pyarrow.int32())), ("labels", pyarrow.list_(pyarrow.int32()))])
RECORDS_PER_BATCH = 64  # in memory at once
REMOVED = ["source", "id", *OVERLAP_COLUMNS]
Drawn = tuple[int, str, Conversation]  # priority, id
OUTCOMES = ["read", "malformed", "without an answer", "duplicate", "too long", "contaminated"]


@dataclass(frozen=True)
class SftSampleSettings:
    """How an instruction set is sampled.

    Attributes:
        num_records: size of the set.
        max_tokens: of a record in the chat template; a longer one is shortened (:func:`longqlora.data.shortening.shorten`).
        seed: of the sample.
        allow_fewer: accept fewer records if a source cannot fill its share.
        max_malformed_share: share of malformed records of a source above which the run stops.
    """

    num_records: int
    max_tokens: int
    seed: int
    allow_fewer: bool
    max_malformed_share: float


@dataclass(frozen=True)
class Unusable:
    """A record that cannot be in the set: its priority, the reason, and its rows in the report on removed records."""

    priority: int
    reason: str
    rows: list[dict]


class InstructionPass(SourcePass):
    """One pass over a source of instructions, which keeps the usable records of the smallest priorities.

    Args:
        source: where the records come from.
        quota: number of records that the source contributes.
        settings: how the set is sampled.
        ngrams: of the evaluation sets.
        folder: for temporary files.
    """

    def __init__(self, source: SftSource, quota: int, settings: SftSampleSettings, ngrams: EvaluationNgrams, folder: Path):
        super().__init__(settings.seed, ngrams)
        self.source, self.quota, self.settings = source, quota, settings
        self.kept = BottomK(quota, folder)
        self.counts = Counter({"without an answer": 0, "duplicate": 0})
        self.known: set[int] = set()  # priorities of all conversations so far
        self.unusable: list[Unusable] = []
        self.unused_fields: Counter[str] = Counter()

    def read(self) -> Iterator[Conversation]:
        """Yield the conversations of all records that have an answer.

        Raises:
            ValueError: if too many records are malformed.
        """
        files = (file for pattern in self.source.paths for file in find_files(pattern))
        reader = partial(read_conversations, schema_name=self.source.record_schema, unused_fields=self.unused_fields)
        for conversation in self.read_files(files, reader):
            if conversation is None:
                self.counts["without an answer"] += 1
            else:
                yield conversation
        counter, max_share = self.counter, self.settings.max_malformed_share
        check_malformed_share(counter.malformed, counter.usable, counter.examples, max_share)
        if self.unused_fields:
            shown = ", ".join(f"{name} ({count})" for name, count in sorted(self.unused_fields.items()))
            log.info("%s: fields that are not used, and the number of records with each: %s", self.source.name, shown)

    def draw(self, conversations: Iterator[Conversation]) -> Iterator[Drawn]:
        """Yield (priority, id, conversation) of each conversation that may be in the sample, without duplicates."""
        for conversation in conversations:
            record_priority, key = self.identify(orjson.dumps(conversation.messages()).decode())
            if record_priority in self.known:
                self.counts["duplicate"] += 1
            elif record_priority < self.kept.threshold:
                yield record_priority, key, conversation
            self.known.add(record_priority)

    def fit(self, drawn: Iterator[Drawn], tokenizer) -> Iterator[tuple[Drawn, tuple[Conversation, int] | None]]:
        """Yield each conversation and what :func:`longqlora.data.shortening.shorten` makes of it, a batch at a time."""
        for batch in batches(drawn, text_of=lambda record: record[2].text()):
            conversations = [conversation for _, _, conversation in batch]
            yield from zip(batch, shorten_all(conversations, tokenizer, self.settings.max_tokens), strict=True)

    def keep(self, drawn: Iterator[Drawn], tokenizer) -> None:
        """Keep the conversations that fit, shortened if necessary, and that share nothing with an evaluation set."""
        name = self.source.name
        for (record_priority, key, conversation), fitting in self.fit(drawn, tokenizer):
            used, num_tokens = fitting or (None, 0)
            if used is None:
                self.unusable.append(Unusable(record_priority, "too long", []))
            elif rows := self.overlap_rows(used.text(), {"source": name, "id": key}):
                self.unusable.append(Unusable(record_priority, "contaminated", rows))
            else:
                shortened = used is not conversation
                value = {"source": name, "num_tokens": num_tokens, "shortened": shortened, "messages": used.messages()}
                self.kept.add(record_priority, key, value)

    def run(self, tokenizer) -> None:
        """Read the source, draw from it, and keep the usable records."""
        self.keep(self.draw(self.read()), tokenizer)

    def removed(self) -> list[Unusable]:
        """Unusable records that would have been in the sample."""
        return [record for record in self.unusable if record.priority < self.kept.threshold]

    def card(self) -> dict[str, int]:
        """Number of records by outcome; of the unusable ones, those that would have been in the sample."""
        reasons = Counter({"too long": 0, "contaminated": 0})
        reasons.update(record.reason for record in self.removed())
        taken = Counter({"taken": 0, "shortened": 0, "tokens": 0})
        for _, _, value in self.kept:  # one at a time: together they may be gigabytes
            taken.update(taken=1, shortened=value["shortened"], tokens=value["num_tokens"])
        return {
            "read": self.counter.usable,
            "malformed": self.counter.malformed,
            **self.counts,
            **reasons,
            "wanted": self.quota,
            **taken,
        }

    def file_cards(self) -> list[dict]:
        """Entries of the data card on the files."""
        return [{"path": file.path, "sha256": file.sha256, "records": file.usable} for file in self.files]

    def rows(self) -> Iterator[dict]:
        """Yield the records that are kept, in the order of their priorities, each with its relative place in the source: by
        these, the set is in random order, and every part of it has the sources in their shares."""
        count = len(self.kept.heap)
        for number, (_, key, value) in enumerate(self.kept):
            yield {"place": (number + 0.5) / count, "id": key, **value}


def check_quotas(cards: dict[str, dict[str, int]], settings: SftSampleSettings) -> None:
    """Check that every source has enough records for its share, or, with ``allow_fewer``, that there is a record.

    Raises:
        ValueError: if not; the message says which source has how many records.
    """
    short = [
        f"{name} has {card['taken']} of {card['wanted']}" for name, card in cards.items() if card["taken"] < card["wanted"]
    ]
    is_empty = not any(card["taken"] for card in cards.values())
    if is_empty or (short and not settings.allow_fewer):
        counts = {outcome: sum(card[outcome] for card in cards.values()) for outcome in OUTCOMES}
        found = ", ".join(f"{number} {outcome}" for outcome, number in counts.items() if number)
        raise ValueError(
            f"sft.num_records asks for {settings.num_records} records of at most {settings.max_tokens} tokens, but "
            f"{'; '.join(short)} ({found or 'the files have no record'}); "
            f"sft.allow_fewer: true accepts a smaller set{', but not an empty one' if is_empty else ''}"
        )


def build_sft_set(
    *,
    sources: list[SftSource],
    settings: SftSampleSettings,
    tokenizer,
    ngrams: EvaluationNgrams,
    output: str,
    removed: str,
) -> dict:
    """Sample every source by its share and write the records (Parquet: source, id, num_tokens, shortened, messages).

    Args:
        sources: where the records come from.
        settings: how they are sampled.
        tokenizer: counts the tokens of a conversation in the chat template.
        ngrams: of the evaluation sets; records that share some are removed, and the finished set is compared once more.
        output: Parquet file to write.
        removed: CSV file to write: the contaminated records.

    Returns:
        The data card: the number of records of each source by outcome, and with each field that its schema does not use.

    Raises:
        ValueError: if a source has too few records for its share, or too many malformed ones, or the set has no record or
            overlaps an evaluation set.
    """
    tokenizer = with_chat_template(tokenizer)
    quotas = apportion(settings.num_records, {source.name: source.share for source in sources})
    passes = []
    for source in sources:
        passes.append(InstructionPass(source, quotas[source.name], settings, ngrams, Path(output).parent))
        passes[-1].run(tokenizer)
    cards = {reading.source.name: reading.card() for reading in passes}
    check_quotas(cards, settings)
    write_parquet(output, RECORDS, heapq.merge(*(reading.rows() for reading in passes), key=itemgetter("place")))
    check_clean(((row["id"], text_of(row["messages"])) for _, row in read_parquet(output)), ngrams, "the instruction set")
    rows = [row for reading in passes for record in reading.removed() for row in record.rows]
    pandas.DataFrame(rows, columns=REMOVED).convert_dtypes().to_csv(removed, index=False)
    sample_settings = {name: getattr(settings, name) for name in ("num_records", "max_tokens", "seed")}
    return {
        "records": sum(card["taken"] for card in cards.values()),
        "tokens": sum(card["tokens"] for card in cards.values()),
        "sources": cards,
        "unused_fields": {reading.source.name: dict(sorted(reading.unused_fields.items())) for reading in passes},
        "malformed": [example for reading in passes for example in reading.counter.examples],
        "normalization": NORMALIZATION,
        "settings": {**sample_settings, "ngram_words": ngrams.n},
        "files": [file for reading in passes for file in reading.file_cards()],
    }


def tokenize_sft(*, records: str, tokenizer, held_out: int, output: str) -> dict[str, int]:
    """Tokenize an instruction set into an Arrow file (``input_ids``, ``labels``), which ``datasets`` maps into memory.

    Args:
        records: Parquet file of :func:`build_sft_set`.
        tokenizer: of transformers.
        held_out: number of records, at the end of the set, that are left out: a random sample with the set's shares.
        output: Arrow file to write, a batch of records at a time.

    Returns:
        Number of records, of tokens, and of tokens that the loss covers (``learned``).

    Raises:
        ValueError: if nothing is left to train on.
    """
    tokenizer = with_chat_template(tokenizer)
    counts: Counter[str] = Counter()
    num_records = pyarrow.parquet.read_metadata(records).num_rows
    if num_records <= held_out:
        raise ValueError(
            f"sft.held_out keeps {held_out} records from the training, and the instruction set has {num_records}: nothing is "
            "left to train on; lower sft.held_out, or add records to sft.sources"
        )
    rows = islice(read_parquet(records), num_records - held_out)
    with pyarrow.OSFile(output, "wb") as file, pyarrow.ipc.new_stream(file, TOKENS) as writer:
        while batch := [row["messages"] for _, row in islice(rows, RECORDS_PER_BATCH)]:
            ids, labels = zip(*tokenize_conversations(tokenizer, batch), strict=True)
            writer.write_batch(pyarrow.record_batch([pyarrow.array(ids), pyarrow.array(labels)], schema=TOKENS))
            counts["records"] += len(batch)
            counts["tokens"] += sum(map(len, ids))
            counts["learned"] += sum(label != IGNORED for row in labels for label in row)
    log.info("%(records)d records, %(tokens)d tokens, of which the loss covers %(learned)d", counts)
    return dict(counts)
