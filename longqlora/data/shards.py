"""One pass over a shard of the corpus, which keeps the texts that the sample may need.

As little work as possible is done per text. Most texts are rejected by their number of characters; of the others, those
outside the examined share are skipped by their hash; only the rest are tokenized and compared with the evaluation sets. The
outcome of every text is counted by source.
"""

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import orjson
import pyarrow

from longqlora.config.settings import CorpusSource
from longqlora.data.decontamination import EvaluationNgrams
from longqlora.data.length_bounds import length_bounds
from longqlora.data.readers import Document, Fields, find_files, read_documents, write_parquet
from longqlora.data.sampling import NUM_PRIORITIES, BottomK, apportion
from longqlora.data.source_pass import SourcePass
from longqlora.data.token_files import batches, encode_batch

MAX_SOURCES = 1000  # of a corpus; published ones have 7 (RedPajama) to some hundreds (programming languages)
ALL = "all"  # name of the only stratum if no shares are given
SAMPLE = pyarrow.schema(
    [("id", "string"), ("source", "string"), ("num_tokens", "int64"), ("metadata", "string"), ("text", "string")]
)
CANDIDATES = pyarrow.schema([("priority", "uint64"), ("stratum", "string"), *SAMPLE])
PRIORITIES = pyarrow.schema([("priority", "uint64"), ("source", "string")])
PRIORITIES_PER_GROUP = 2**14  # of the Parquet file
candidate_order = itemgetter("priority", "id", "stratum", "source", "metadata")


@dataclass(frozen=True)
class SampleSettings:
    """Which texts are sampled.

    Attributes:
        num_texts: size of the sample.
        min_tokens, max_tokens: smallest and largest length of a text, in tokens.
        seed: of the sample.
        examined_share: share of the texts, chosen by priority, that are tokenized and checked; below 1 if the corpus has far
            more texts than the sample.
        shares: share of the sample by stratum; None: every text is equally likely.
        keep_reserve: whether each shard keeps twice as many texts as the sample has, because joining the shards may remove
            some (near-duplicates, and texts that are in two strata).
    """

    num_texts: int
    min_tokens: int
    max_tokens: int
    seed: int
    examined_share: float = 1.0
    shares: dict[str, float] | None = None
    keep_reserve: bool = False

    def quotas(self) -> dict[str, int]:
        """Number of texts in the sample, by stratum."""
        return apportion(self.num_texts, self.shares or {ALL: 1.0})

    def num_kept(self) -> dict[str, int]:
        """Number of texts that each shard keeps, by stratum."""
        return {stratum: (2 if self.keep_reserve else 1) * quota for stratum, quota in self.quotas().items()}


@dataclass(frozen=True)
class ShardFiles:
    """Files that are made of one shard.

    Attributes:
        candidates: Parquet file of the texts that are kept, in the order of their priorities.
        priorities: Parquet file of priority and source of every text that could be sampled; it shows which are duplicates.
        card: JSON file: counts by source, files, malformed and removed records, extremes of characters per token.
    """

    candidates: str
    priorities: str
    card: str


class Candidate(NamedTuple):
    """A document that may be sampled, with its id, its priority, and its number of tokens (0: not counted yet)."""

    document: Document
    id: str
    priority: int
    num_tokens: int = 0


class ShardPass(SourcePass):
    """One pass over a shard of the corpus. It is a chain of generators; each step counts the texts that it rejects.

    Args:
        settings: of the sample.
        source: of the texts.
        tokenizer: of transformers; it counts tokens.
        ngrams: of the evaluation sets.
        folder: for temporary files.
    """

    def __init__(self, settings: SampleSettings, source: CorpusSource, tokenizer, ngrams: EvaluationNgrams, folder: Path):
        super().__init__(settings.seed, ngrams)
        self.settings, self.tokenizer = settings, tokenizer
        self.fields = Fields(source.text_field, source.source_field, tuple(source.metadata_fields))
        self.name = source.name or source.paths[0]
        self.stratum = self.name if source.share is not None else None  # without: each text is of the stratum of its source
        self.bounds = length_bounds(tokenizer)
        self.counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.removed: list[dict] = []
        self.min_density, self.max_density = float("inf"), 0.0  # characters per token of the tokenized texts
        self.kept = {stratum: BottomK(number, folder) for stratum, number in settings.num_kept().items()}

    def read(self, paths: list[str]) -> Iterator[Document]:
        """Yield the documents of the files."""
        yield from self.read_files(paths, partial(read_documents, fields=self.fields, name=self.name))
        if self.counter.malformed:
            self.counts[self.name]["malformed"] = self.counter.malformed

    def examine(self, documents: Iterable[Document]) -> Iterator[Candidate]:
        """Yield the documents to examine: of a length that may be in range, and inside the examined share."""
        settings, bounds, end = self.settings, self.bounds, int(self.settings.examined_share * NUM_PRIORITIES)
        for document in documents:
            text, tally = document.text, self.counts[document.source]
            check_num_sources(self.counts)
            tally["read"] += 1
            if bounds.is_too_short(text, settings.min_tokens):
                tally["too short by characters"] += 1
            elif bounds.is_too_long(text, settings.max_tokens):
                tally["too long by characters"] += 1
            else:
                text_priority, key = self.identify(text)
                if text_priority < end:
                    yield Candidate(document, key, text_priority)
                else:
                    tally["not examined"] += 1

    def count_tokens(self, candidates: Iterable[Candidate]) -> Iterator[Candidate]:
        """Yield the candidates whose number of tokens is in range, with this number."""
        for batch in batches(candidates, text_of=lambda candidate: candidate.document.text):
            encodings = encode_batch(self.tokenizer, [candidate.document.text for candidate in batch])
            for candidate, num_tokens in zip(batch, map(len, encodings), strict=True):
                tally, density = self.counts[candidate.document.source], len(candidate.document.text) / max(1, num_tokens)
                self.max_density, self.min_density = max(self.max_density, density), min(self.min_density, density)
                if num_tokens < self.settings.min_tokens:
                    tally["too short"] += 1
                elif num_tokens > self.settings.max_tokens:
                    tally["too long"] += 1
                else:
                    tally["in range"] += 1
                    yield candidate._replace(num_tokens=num_tokens)

    def decontaminate(self, candidates: Iterable[Candidate]) -> Iterator[Candidate]:
        """Yield the candidates that share nothing with an evaluation set."""
        for candidate in candidates:
            document = candidate.document
            origin = {"source": document.source, "id": candidate.id, "path": document.path, "line": document.line}
            if rows := self.overlap_rows(document.text, origin):
                self.counts[document.source]["contaminated"] += 1
                self.removed.extend(rows)
            else:
                yield candidate

    def keep(self, candidates: Iterable[Candidate]) -> Iterator[dict]:
        """Offer the candidates to their strata; yield the priority and the source of each that could be sampled."""
        for document, key, text_priority, num_tokens in candidates:
            stratum = (self.stratum or document.source) if self.settings.shares else ALL
            if stratum in self.kept:
                metadata = orjson.dumps(document.metadata, default=str).decode()  # str: Parquet has decimals and bytes
                value = {"source": document.source, "num_tokens": num_tokens, "metadata": metadata, "text": document.text}
                self.kept[stratum].add(text_priority, key, value)
                yield {"priority": text_priority, "source": document.source}
            else:
                self.counts[document.source]["without a share"] += 1

    def rows(self) -> Iterator[dict]:
        """Yield the texts that are kept, in the order of their priorities."""

        def of_stratum(stratum: str) -> Iterator[dict]:
            for text_priority, key, value in self.kept[stratum]:
                yield {"priority": text_priority, "id": key, "stratum": stratum, **value}

        return heapq.merge(*map(of_stratum, self.kept), key=candidate_order)

    def card(self) -> dict:
        """Part of the data card: counts by source, files, malformed and removed records, and density of the texts."""
        return {
            "counts": self.counts,
            "files": [
                {"path": file.path, "sha256": file.sha256, "documents": file.usable, "malformed": file.malformed}
                for file in self.files
            ],
            "malformed": self.counter.examples,
            "removed": self.removed,
            "characters_per_token": [self.min_density, self.max_density] if self.max_density else [],
            "length_bounds": str(self.bounds),
        }


def check_num_sources(sources: Collection[str]) -> None:
    """Check that ``source_field`` names subsets of the corpus, not single texts or web sites.

    Raises:
        ValueError: if there are more than ``MAX_SOURCES`` sources.
    """
    if len(sources) > MAX_SOURCES:
        examples = ", ".join(source[:60] for source in sorted(sources)[:3])
        raise ValueError(
            f"corpus.sources: the texts name more than {MAX_SOURCES} sources, such as {examples}; source_field must be a field "
            "with few values, the subsets of the corpus. If there is none, name a field that the records lack: then all texts "
            "belong to one source, by its name"
        )


def sample_shard(
    *,
    settings: SampleSettings,
    source: CorpusSource,
    part: tuple[int, int],
    tokenizer,
    ngrams: EvaluationNgrams,
    output: ShardFiles,
) -> None:
    """Read a shard of the corpus and keep the texts that the sample may need: those of the smallest priorities.

    Args:
        settings: of the sample.
        source: with the paths of this shard only.
        part: of the files that match a wildcard, see :func:`longqlora.data.readers.find_files`.
        tokenizer: of transformers; it counts tokens.
        ngrams: of the evaluation sets.
        output: files to write.

    Raises:
        ValueError: if a file is damaged or of an unknown format, more records are malformed than usable, or the texts name too
            many sources.
    """
    shard = ShardPass(settings, source, tokenizer, ngrams, Path(output.candidates).parent)
    files = [file for path in source.paths for file in find_files(path, part)]
    clean = shard.decontaminate(shard.count_tokens(shard.examine(shard.read(files))))
    write_parquet(output.priorities, PRIORITIES, shard.keep(clean), rows_per_group=PRIORITIES_PER_GROUP)
    write_parquet(output.candidates, CANDIDATES, shard.rows())
    Path(output.card).write_text(json.dumps(shard.card(), indent=2, ensure_ascii=False), encoding="utf-8")
