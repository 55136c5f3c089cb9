"""The jobs that read a corpus."""

import glob
import re
from pathlib import Path

from longqlora.config.completed import Shard
from longqlora.config.paths import is_local
from longqlora.config.settings import CorpusSettings, CorpusSource
from longqlora.jobs.digests import digest_of_values

MAX_SHARDS = 256  # per source, by default: the join keeps one file of each job open

SHARD_NAME = r"[\w.-]+-[0-9a-f]{8}"
"""Pattern of the name of a job. Snakemake reads it for each file of each job, so it must not be a list of all names."""


def corpus_shards(sources: list[CorpusSource]) -> dict[str, Shard]:
    """The jobs that read a corpus, by name.

    A job that has one file is named after it and knows of no other, so that further files bring further jobs and change none.
    """
    shards = {}
    for source in sources:
        patterns = [path for path in source.paths if not is_local(path) and glob.has_magic(path)]
        files = [path for path in source.paths if path not in patterns]
        usual = 1 if all(path.endswith(".txt") for path in files) else min(len(source.paths), MAX_SHARDS)
        jobs = source.jobs or usual
        for number in range(jobs):
            paths, part = files[number::jobs] + patterns, (number, jobs) if patterns else (0, 1)
            if not paths:  # more jobs than files
                continue
            name = Path(paths[0]).name if len(files) == jobs and not patterns else f"part-{number}-of-{jobs}"
            digest = digest_of_values([source.model_dump(exclude={"paths", "jobs", "share"}), paths, part])[:8]
            name = re.sub(r"[^\w.-]", "_", name)  # it becomes the name of a file, and Snakemake reads braces as wildcards
            shards[f"{name}-{digest}"] = Shard(source=source.model_copy(update={"paths": paths, "jobs": None}), part=part)
    return shards


def sample_shares(corpus: CorpusSettings) -> dict[str, float] | None:
    """Share of the sample by source, or by the subset that records name; None if no share is given."""
    by_source = {str(source.name): source.share for source in corpus.sources if source.share is not None}
    return corpus.shares or by_source or None
