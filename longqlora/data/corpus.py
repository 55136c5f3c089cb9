"""The corpus that an adapter is trained on: a uniform sample of texts, joined from what each shard kept.

The sample is the same for any number of shards and any order of files (bottom-k by a hash of the text, see
:mod:`longqlora.data.sampling`). The data card says what became of every text that was read.
"""

import heapq
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from itertools import groupby
from operator import itemgetter

import pandas

from longqlora.data.decontamination import EvaluationNgrams, Overlap, check_clean
from longqlora.data.readers import check_malformed, read_parquet, write_parquet
from longqlora.data.shards import PLACE_IN_ORDER, SAMPLE, SampleSettings

OUTCOMES = [
    "read", "malformed", "too short by characters", "too long by characters", "not examined", "too short", "too long",
    "in range", "contaminated", "of no share", "duplicate", "near-duplicate", "not drawn", "sampled",
]  # fmt: skip
REMOVED = ["source", "id", "path", "line", *Overlap.__dataclass_fields__, "near_duplicate_of", "similarity"]


class Join:
    """Draws the sample from the candidates of all shards, in the order of their priorities."""

    def __init__(self, settings: SampleSettings, near_duplicates: float | None):
        self.quotas, self.limits = settings.quotas(), {place: 2 * quota for place, quota in settings.quotas().items()}
        self.taken, self.seen = Counter(), Counter()  # by stratum
        self.sampled, self.near = Counter(), Counter()  # by source
        self.chosen: dict[int, str] = {}  # by priority, the source whose copy of a text was used
        self.removed = []
        self.known = None
        if near_duplicates:
            from longqlora.data.near_duplicates import NearDuplicates  # most experiments do without

            self.known = NearDuplicates(near_duplicates)

    def rows(self, shards: list[str]) -> Iterator[dict]:
        """Yield the sample. A text that several strata have goes to the first by name that has room."""
        streams = [(row for _, row in read_parquet(path)) for path in shards]
        for _, copies in groupby(heapq.merge(*streams, key=PLACE_IN_ORDER), key=itemgetter("priority", "id")):
            copies = list(copies)
            row = next((copy for copy in copies if self.has_room(copy["stratum"])), None)
            self.seen.update({copy["stratum"] for copy in copies})  # every shard kept it in each of these, in place of another
            if row is None:
                continue
            near = self.known and self.known.find_or_add(row["id"], row["text"])
            source = row["source"]
            self.chosen[row["priority"]] = source
            if near:
                self.near[source] += 1
                self.removed.append({"source": source, "id": row["id"], "near_duplicate_of": near[0], "similarity": near[1]})
            else:
                self.taken[row["stratum"]] += 1
                self.sampled[source] += 1
                yield row

    def has_room(self, stratum: str) -> bool:
        """Whether a stratum takes more: not beyond its quota, nor beyond what every shard is sure to have kept."""
        return self.taken[stratum] < self.quotas[stratum] and self.seen[stratum] < self.limits[stratum]

    def missing(self) -> list[str]:
        """The strata that are short of texts: each has how many of how many."""
        return [
            f"{place} has {self.taken[place]} of {quota}" for place, quota in self.quotas.items() if self.taken[place] < quota
        ]


def count_duplicates(priorities: list[str], chosen: dict[int, str]) -> Counter:
    """How many texts of each source are copies of another; of equal texts the one that was used is none, or, where none was,
    the one whose source comes first by name."""
    rows = pandas.concat([pandas.read_parquet(path) for path in priorities], ignore_index=True)
    rows["unused"] = [
        chosen.get(order, source) != source for order, source in zip(rows["priority"], rows["source"], strict=True)
    ]
    rows = rows.sort_values(["priority", "unused", "source"])
    return Counter(rows.loc[rows.duplicated("priority"), "source"].value_counts().to_dict())


def ledger(cards: list[dict], duplicates: Counter, join: Join) -> pandas.DataFrame:
    """What became of the texts of each source: rows are sources, columns outcomes.

    Every document that was read has one outcome: rejected by its characters, not examined, of the wrong length, or in range;
    and every one in range is contaminated, of no share, a duplicate, a near-duplicate, sampled, or not drawn.
    """
    counts = pandas.DataFrame(0, index=sorted({source for card in cards for source in card["counts"]}), columns=OUTCOMES)
    for card in cards:
        for source, tally in card["counts"].items():
            for outcome, number in tally.items():
                counts.loc[source, outcome] += number
    for outcome, numbers in {"duplicate": duplicates, "near-duplicate": join.near, "sampled": join.sampled}.items():
        counts[outcome] = counts.index.map(numbers)
    used = ["contaminated", "of no share", "duplicate", "near-duplicate", "sampled"]
    counts["not drawn"] = counts["in range"] - counts[used].sum(axis=1)
    return counts


def joined_card(cards: list[dict]) -> dict:
    """What the data card takes from the shards as it is."""
    densities = [density for card in cards for density in card["characters_per_token"]]
    return {
        "length_bounds": cards[0]["length_bounds"],
        "characters_per_token": {"min": min(densities), "max": max(densities)} if densities else {},
        "malformed": [example for card in cards for example in card["malformed"]],
        "files": [file for card in cards for file in card["files"]],
    }


def shortage(settings: SampleSettings, join: Join, counts: pandas.DataFrame) -> str:
    """Which stratum has how many of how many texts, and what became of the others."""
    found = ", ".join(f"{number} {outcome}" for outcome, number in counts.sum().items() if number)
    hint = "; corpus.examined_share limits what is looked at" if settings.examined_share < 1 else ""
    return (
        f"corpus.num_texts asks for {settings.num_texts} texts of {settings.min_tokens} to {settings.max_tokens} tokens, but "
        f"{'; '.join(join.missing())} ({found}){hint}; corpus.allow_fewer: true would take what there is"
    )


def sample_corpus(
    *,
    settings: SampleSettings,
    shards: list[str],
    priorities: list[str],
    cards: list[dict],
    near_duplicates: float | None,
    allow_fewer: bool,
    max_malformed_share: float,
    ngrams: EvaluationNgrams,
    output: str,
    removed: str,
) -> dict:
    """Join what :func:`sample_shard` kept of each shard into the sample (Parquet: id, source, num_tokens, metadata, text).

    Args:
        settings: what is sampled, as for the shards.
        shards, priorities, cards: of all shards.
        near_duplicates: similarity from which on two texts count as the same; None: only equal texts do.
        allow_fewer: whether a smaller sample will do where the corpus does not hold enough.
        max_malformed_share: of all records, before the run stops.
        ngrams: of the evaluation sets; the sample is checked against them once more.
        output: path of the sample.
        removed: CSV file of what was removed as contaminated, or as a near-duplicate.

    Returns:
        The data card.

    Raises:
        ValueError: if too many records are malformed, a stratum has too few texts, or the sample overlaps an evaluation set.
    """
    card = joined_card(cards)
    documents, malformed = (sum(file[kind] for file in card["files"]) for kind in ("documents", "malformed"))
    check_malformed(malformed, documents, card["malformed"], max_malformed_share)
    join = Join(settings, near_duplicates)
    write_parquet(output, SAMPLE, ({name: row[name] for name in SAMPLE.names} for row in join.rows(shards)))
    counts = ledger(cards, count_duplicates(priorities, join.chosen), join)
    if join.missing() and not allow_fewer:
        raise ValueError(shortage(settings, join, counts))
    check_clean(((row["id"], row["text"]) for _, row in read_parquet(output)), ngrams, "the sample")
    rows = [*(row for card in cards for row in card["removed"]), *join.removed]
    pandas.DataFrame(rows, columns=REMOVED).convert_dtypes().to_csv(removed, index=False)
    sample = pandas.read_parquet(output, columns=["id", "num_tokens"])
    gate = {"near_duplicates": near_duplicates, "ngram_words": ngrams.n, "ngram_threshold": ngrams.threshold}
    return {
        "total": {outcome: int(number) for outcome, number in counts.sum().items()},
        "sources": {source: {k: int(v) for k, v in row.items() if v} for source, row in counts.to_dict("index").items()},
        "sampled_tokens": int(sample["num_tokens"].sum()),
        "sample_sha256": sha256("".join(sample["id"]).encode()).hexdigest(),
        "settings": {**vars(settings), **gate},
        **card,
    }
