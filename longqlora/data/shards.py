"""One pass over a part of a corpus: which texts the sample could need.

A text is looked at as little as will do: most are rejected by their number of characters; of the others those outside the
examined share are passed over by their hash; only the rest are tokenised and held against the evaluation sets. What became of
each text is counted, by its source.
"""

import heapq
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import orjson
import pyarrow

from longqlora.data.decontamination import EvaluationNgrams
from longqlora.data.length_bounds import length_bounds
from longqlora.data.readers import Document, Fields, MalformedRecords, find_files, read_documents, text_id, write_parquet
from longqlora.data.sampling import NUM_PRIORITIES, BottomK, apportion, priority
from longqlora.data.token_files import batches, encode_batch

log = logging.getLogger(__name__)

ALL = "all"  # name of the one stratum where no shares are given
SAMPLE = pyarrow.schema(
    [("id", "string"), ("source", "string"), ("num_tokens", "int64"), ("metadata", "string"), ("text", "string")]
)
CANDIDATES = pyarrow.schema([("priority", "uint64"), ("stratum", "string"), *SAMPLE])
PLACE_IN_ORDER = itemgetter("priority", "id", "stratum", "source", "metadata")
PRIORITIES = pyarrow.schema([("priority", "uint64"), ("source", "string")])


@dataclass(frozen=True)
class SampleSettings:
    """What is sampled.

    Attributes:
        num_texts: size of the sample.
        min_tokens, max_tokens: range of a text's length, both ends included.
        seed: of the sample.
        examined_share: share of the texts, drawn by priority, that are tokenised and checked at all: less than 1 where a
            corpus has far more texts than the sample.
        shares: of the sample, by stratum; None: each text is equally likely.
        spare: whether the join may drop texts, so that a shard keeps twice what the sample holds.
    """

    num_texts: int
    min_tokens: int
    max_tokens: int
    seed: int
    examined_share: float = 1.0
    shares: dict[str, float] | None = None
    spare: bool = False

    def quotas(self) -> dict[str, int]:
        """Size of the sample by stratum."""
        return apportion(self.num_texts, self.shares or {ALL: 1.0})


class Candidate(NamedTuple):
    """A document that may be sampled: its identity, its priority, and its number of tokens once they are counted."""

    document: Document
    id: str
    priority: int
    num_tokens: int = 0


class Shard:
    """One pass over a part of the corpus: what becomes of each text is counted, by source."""

    def __init__(self, settings: SampleSettings, tokenizer, ngrams: EvaluationNgrams):
        self.settings, self.tokenizer, self.ngrams = settings, tokenizer, ngrams
        self.bounds = length_bounds(tokenizer)
        self.counts, self.malformed = defaultdict(Counter), MalformedRecords()
        self.files, self.removed = [], []
        self.densest, self.sparsest = float("inf"), 0.0  # fewest and most characters per token of what was tokenised

    def read(self, paths: list[str], fields: Fields, name: str) -> Iterator[Document]:
        """Yield the documents of the files, and note the digest of each file and how many it has."""
        for path in paths:
            digest, documents, malformed = sha256(), self.malformed.read, self.malformed.count
            for document in read_documents(path, fields, name, self.malformed, digest):
                self.malformed.read += 1
                yield document
            documents, malformed = self.malformed.read - documents, self.malformed.count - malformed
            self.files.append({"path": path, "sha256": digest.hexdigest(), "documents": documents, "malformed": malformed})
            if malformed:
                self.counts[name]["malformed"] += malformed
            log.info("%s: %d documents, %d malformed records", path, documents, malformed)
        self.malformed.check_form()

    def examined(self, documents: Iterable[Document]) -> Iterator[Candidate]:
        """Yield what must be looked at closely: neither proved to be of the wrong length, nor outside the examined share."""
        settings, bounds, end = self.settings, self.bounds, int(self.settings.examined_share * NUM_PRIORITIES)
        for document in documents:
            text, tally = document.text, self.counts[document.source]
            tally["read"] += 1
            if bounds.is_too_short(text, settings.min_tokens):
                tally["too short by characters"] += 1
            elif bounds.is_too_long(text, settings.max_tokens):
                tally["too long by characters"] += 1
            else:
                identity = text_id(text)
                order = priority(identity, settings.seed)
                if order < end:
                    yield Candidate(document, identity, order)
                else:
                    tally["not examined"] += 1

    def in_range(self, candidates: Iterable[Candidate]) -> Iterator[Candidate]:
        """Yield those whose number of tokens is in the range, with that number."""
        for batch in batches(candidates, text_of=lambda candidate: candidate.document.text):
            encodings = encode_batch(self.tokenizer, [candidate.document.text for candidate in batch])
            for candidate, num_tokens in zip(batch, map(len, encodings), strict=True):
                tally, density = self.counts[candidate.document.source], len(candidate.document.text) / max(1, num_tokens)
                self.sparsest, self.densest = max(self.sparsest, density), min(self.densest, density)
                if num_tokens < self.settings.min_tokens:
                    tally["too short"] += 1
                elif num_tokens > self.settings.max_tokens:
                    tally["too long"] += 1
                else:
                    tally["in range"] += 1
                    yield candidate._replace(num_tokens=num_tokens)

    def clean(self, candidates: Iterable[Candidate]) -> Iterator[Candidate]:
        """Yield those that share nothing with an evaluation set, and note the others."""
        for candidate in candidates:
            document, overlaps = candidate.document, self.ngrams.overlaps(candidate.document.text)
            if overlaps:
                self.counts[document.source]["contaminated"] += 1
                origin = {"source": document.source, "id": candidate.id, "path": document.path, "line": document.line}
                self.removed.extend({**origin, **vars(overlap)} for overlap in overlaps)
            else:
                yield candidate

    def keep(self, candidates: Iterable[Candidate], stratum: str | None, kept: dict[str, BottomK]) -> Iterator[dict]:
        """Offer the candidates to their strata; yield the priority and source of each that could be sampled."""
        for document, identity, order, num_tokens in candidates:
            place = (stratum or document.source) if self.settings.shares else ALL
            if place in kept:
                metadata = orjson.dumps(document.metadata, default=str).decode()  # Parquet has decimals and bytes
                value = {"source": document.source, "num_tokens": num_tokens, "metadata": metadata, "text": document.text}
                kept[place].add(order, identity, value)
                yield {"priority": order, "source": document.source}
            else:
                self.counts[document.source]["of no share"] += 1


def candidates_of(stratum: str, best: BottomK) -> Iterator[dict]:
    """The rows of a stratum, by priority."""
    for order, key, value in best:
        yield {"priority": order, "id": key, "stratum": stratum, **value}


def sample_shard(
    *,
    settings: SampleSettings,
    paths: list[str],
    part: tuple[int, int],
    fields: Fields,
    name: str,
    stratum: str | None,
    tokenizer,
    ngrams: EvaluationNgrams,
    output: str,
    priorities: str,
) -> dict:
    """Read a part of the corpus and keep of it what the sample could need: the texts of the smallest priorities.

    Args:
        settings: what is sampled.
        paths, part: see :func:`longqlora.data.readers.find_files`.
        fields, name: see :func:`longqlora.data.readers.read_documents`.
        stratum: that all texts belong to; None: each to that of its source.
        tokenizer: of transformers; it counts the tokens.
        ngrams: of the evaluation sets.
        output: Parquet file of the candidates, by priority.
        priorities: Parquet file of the priority and the source of every text that could be sampled.

    Returns:
        For the data card: counts by source, files, malformed and removed records, extremes of characters per token.

    Raises:
        ValueError: if a file is damaged, or most records are malformed.
    """
    shard = Shard(settings, tokenizer, ngrams)
    files = [file for path in paths for file in find_files(path, part)]
    copies = 2 if settings.spare else 1
    kept = {place: BottomK(copies * quota, Path(output).parent) for place, quota in settings.quotas().items()}
    usable = shard.clean(shard.in_range(shard.examined(shard.read(files, fields, name))))
    write_parquet(priorities, PRIORITIES, shard.keep(usable, stratum, kept), rows_per_group=2**14)
    rows = heapq.merge(*(candidates_of(place, best) for place, best in kept.items()), key=PLACE_IN_ORDER)
    write_parquet(output, CANDIDATES, rows)
    return {
        "counts": shard.counts,
        "files": shard.files,
        "malformed": shard.malformed.examples,
        "removed": shard.removed,
        "characters_per_token": [shard.densest, shard.sparsest] if shard.sparsest else [],
        "length_bounds": str(shard.bounds),
    }
