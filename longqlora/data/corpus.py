"""The corpus that systems are trained on: a uniform sample of texts, joined from what each shard has kept.

The sample does not depend on the number of shards or on the order of the files (bottom-k by a hash of the text, see
:mod:`longqlora.data.sampling`). The data card has the outcome of every text that was read.
"""

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import pandas

from longqlora.data.decontamination import EvaluationNgrams, check_clean
from longqlora.data.readers import NORMALIZATION, read_parquet, write_parquet
from longqlora.data.shards import SAMPLE, SampleSettings, ShardFiles, candidate_order, check_num_sources
from longqlora.data.source_pass import OVERLAP_COLUMNS, check_malformed_share

OUTCOMES = [
    "read", "malformed", "too short by characters", "too long by characters", "not examined", "too short", "too long",
    "in range", "contaminated", "without a share", "duplicate", "near-duplicate", "not drawn", "sampled",
]  # fmt: skip
REMOVED = ["source", "id", "path", "line", *OVERLAP_COLUMNS, "near_duplicate_of", "similarity"]


@dataclass(frozen=True)
class JoinSettings:
    """How shards are joined.

    Attributes:
        near_duplicates: similarity from which one of two texts is removed; None: only equal texts are.
        allow_fewer: accept a smaller sample if the corpus does not have enough texts.
        max_malformed_share: share of malformed records above which the run stops.
    """

    near_duplicates: float | None
    allow_fewer: bool
    max_malformed_share: float


class SampleJoin:
    """Draws the sample from the candidates of all shards, in the order of their priorities.

    Args:
        settings: of the sample.
        near_duplicates: see :class:`JoinSettings`.
    """

    def __init__(self, settings: SampleSettings, near_duplicates: float | None):
        self.quotas, self.num_kept = settings.quotas(), settings.num_kept()
        self.taken: Counter[str] = Counter()  # by stratum
        self.seen: Counter[str] = Counter()  # by stratum
        self.sampled: Counter[str] = Counter()  # by source
        self.near_duplicates: Counter[str] = Counter()  # by source
        self.chosen: dict[int, str] = {}  # by priority, the source whose copy of a text was used
        self.removed: list[dict] = []
        self.index = None
        if near_duplicates:
            from longqlora.data.near_duplicates import NearDuplicates  # slow to import, and most experiments do without

            self.index = NearDuplicates(near_duplicates)

    def rows(self, candidates: Iterable[str]) -> Iterator[dict]:
        """Yield the sample. A text that is in several strata goes to the first one, by name, that has room.

        Args:
            candidates: Parquet files of the shards' candidates.
        """
        streams = [(row for _, row in read_parquet(path)) for path in candidates]
        for _, equal_texts in groupby(heapq.merge(*streams, key=candidate_order), key=itemgetter("priority", "id")):
            copies = list(equal_texts)
            row = next((copy for copy in copies if self.has_room(copy["stratum"])), None)
            self.seen.update({copy["stratum"] for copy in copies})  # in each of these, every shard may have dropped another
            if row is not None and self.is_new(row):
                self.taken[row["stratum"]] += 1
                self.sampled[row["source"]] += 1
                yield row

    def has_room(self, stratum: str) -> bool:
        """Whether a stratum takes another text: its quota is not full, and every shard is sure to have kept the text."""
        return self.taken[stratum] < self.quotas[stratum] and self.seen[stratum] < self.num_kept[stratum]

    def is_new(self, row: dict) -> bool:
        """Whether a text is not a near-duplicate of an earlier one."""
        source = row["source"]
        self.chosen[row["priority"]] = source
        near = self.index.find_or_add(row["id"], row["text"]) if self.index else None
        if near is None:
            return True
        self.near_duplicates[source] += 1
        self.removed.append({"source": source, "id": row["id"], "near_duplicate_of": near[0], "similarity": near[1]})
        return False

    def shortfalls(self) -> list[str]:
        """Strata with fewer texts than their quota, and the numbers of both."""
        return [
            f"{stratum} has {self.taken[stratum]} of {quota}"
            for stratum, quota in self.quotas.items()
            if self.taken[stratum] < quota
        ]


def count_duplicates(priorities: list[str], chosen: dict[int, str]) -> Counter[str]:
    """Number of duplicates by source.

    Of equal texts, one is not a duplicate: the one that was used, or, if none was, the one of the first source by name.

    Args:
        priorities: Parquet files of the shards.
        chosen: source of the text that was used, by priority.
    """
    rows = pandas.concat([pandas.read_parquet(path) for path in priorities], ignore_index=True)
    rows["unused"] = [chosen.get(key, source) != source for key, source in zip(rows["priority"], rows["source"], strict=True)]
    rows = rows.sort_values(["priority", "unused", "source"])
    return Counter(rows.loc[rows.duplicated("priority"), "source"].value_counts().to_dict())


def count_outcomes(cards: list[dict], duplicates: Counter[str], join: SampleJoin) -> pandas.DataFrame:
    """Number of texts by source (rows) and outcome (columns).

    Every text that was read is rejected by its number of characters, not examined, too short, too long, or in range. Every
    text in range is contaminated, without a share, a duplicate, a near-duplicate, sampled, or not drawn.
    """
    tallies: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for card in cards:
        for source, tally in card["counts"].items():
            tallies[source].update(tally)
    rows = [[tallies[source][outcome] for outcome in OUTCOMES] for source in sorted(tallies)]
    counts = pandas.DataFrame(rows, index=sorted(tallies), columns=OUTCOMES, dtype=int)
    found = {"duplicate": duplicates, "near-duplicate": join.near_duplicates, "sampled": join.sampled}
    for outcome, numbers in found.items():
        counts[outcome] = counts.index.map(numbers)
    used = ["contaminated", "without a share", *found]
    counts["not drawn"] = counts["in range"] - counts[used].sum(axis=1)
    return counts


def combine_cards(cards: list[dict]) -> dict:
    """Entries of the data card that come from the shards' cards unchanged."""
    densities = [density for card in cards for density in card["characters_per_token"]]
    return {
        "length_bounds": cards[0]["length_bounds"],
        "characters_per_token": {"min": min(densities), "max": max(densities)} if densities else {},
        "malformed": [example for card in cards for example in card["malformed"]],
        "files": [file for card in cards for file in card["files"]],
    }


def shortfall_message(settings: SampleSettings, join: SampleJoin, counts: pandas.DataFrame) -> str:
    """Message that says which stratum has too few texts, and what became of the others."""
    found = ", ".join(f"{number} {outcome}" for outcome, number in counts.sum().items() if number)
    hint = "; corpus.examined_share limits how many texts are examined" if settings.examined_share < 1 else ""
    limit = "" if join.taken.total() else ", but not an empty one"
    return (
        f"corpus.num_texts asks for {settings.num_texts} texts of {settings.min_tokens} to {settings.max_tokens} tokens, but "
        f"{'; '.join(join.shortfalls())} ({found or 'the files have no text'}){hint}; "
        f"corpus.allow_fewer: true accepts a smaller sample{limit}"
    )


def describe_sample(path: str, counts: pandas.DataFrame) -> dict:
    """Entries of the data card on a finished sample.

    Args:
        path: Parquet file of the sample.
        counts: see :func:`count_outcomes`.
    """
    sample = pandas.read_parquet(path, columns=["id", "num_tokens"])
    return {
        "total": {outcome: int(number) for outcome, number in counts.sum().items()},
        "sources": {source: {k: int(v) for k, v in row.items() if v} for source, row in counts.to_dict("index").items()},
        "sampled_tokens": int(sample["num_tokens"].sum()),
        "sample_sha256": sha256("".join(sample["id"]).encode()).hexdigest(),
    }


def sample_corpus(
    *,
    settings: SampleSettings,
    joining: JoinSettings,
    shards: list[ShardFiles],
    ngrams: EvaluationNgrams,
    output: str,
    removed: str,
) -> dict:
    """Join what the shards have kept into the sample (Parquet: id, source, num_tokens, metadata, text).

    Args:
        settings: of the sample, the same as for the shards.
        joining: how the shards are joined.
        shards: files of all shards.
        ngrams: of the evaluation sets; the finished sample is compared with them once more.
        output: Parquet file of the sample to write.
        removed: CSV file to write: the texts that were removed because they are contaminated or near-duplicates.

    Returns:
        The data card.

    Raises:
        ValueError: if the texts name too many sources, too many records are malformed, a stratum has too few texts, or the
            sample has no text or overlaps an evaluation set.
    """
    cards = [json.loads(Path(shard.card).read_text(encoding="utf-8")) for shard in shards]
    check_num_sources({source for card in cards for source in card["counts"]})
    card = combine_cards(cards)
    usable, malformed = (sum(file[kind] for file in card["files"]) for kind in ("documents", "malformed"))
    check_malformed_share(malformed, usable, card["malformed"], joining.max_malformed_share)
    join = SampleJoin(settings, joining.near_duplicates)
    write_parquet(output, SAMPLE, join.rows(shard.candidates for shard in shards))
    counts = count_outcomes(cards, count_duplicates([shard.priorities for shard in shards], join.chosen), join)
    if join.shortfalls() and not (joining.allow_fewer and join.taken.total()):
        raise ValueError(shortfall_message(settings, join, counts))
    check_clean(((row["id"], row["text"]) for _, row in read_parquet(output)), ngrams, "the sample")
    rows = [*(row for card in cards for row in card["removed"]), *join.removed]
    pandas.DataFrame(rows, columns=REMOVED).convert_dtypes().to_csv(removed, index=False)
    filters = {"near_duplicates": joining.near_duplicates, "ngram_words": ngrams.n, "ngram_threshold": ngrams.threshold}
    settings_used = {**asdict(settings), **filters}
    return {**describe_sample(output, counts), "normalization": NORMALIZATION, "settings": settings_used, **card}
