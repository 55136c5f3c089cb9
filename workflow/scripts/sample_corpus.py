"""Join the shards into the sample.

Reads what was kept of each shard. Writes the sample (Parquet), its data card (JSON), and the report on removed texts (CSV).
Fails if there are too few texts of the wanted length, too many malformed records, or an overlap with an evaluation set.
"""

import json
from pathlib import Path

from longqlora.jobs.log import job_log

from longqlora.data.corpus import JoinSettings, sample_corpus
from longqlora.data.decontamination import EvaluationNgrams
from longqlora.data.shards import SampleSettings, ShardFiles

with job_log(snakemake.log[0]):
    inputs = snakemake.input
    card = sample_corpus(
        settings=SampleSettings(**snakemake.params.settings),
        joining=JoinSettings(**snakemake.params.joining),
        shards=[ShardFiles(*files) for files in zip(inputs.shards, inputs.priorities, inputs.cards, strict=True)],
        ngrams=EvaluationNgrams(inputs.ngrams, snakemake.params.threshold),
        output=snakemake.output.texts,
        removed=snakemake.output.removed,
    )
    Path(snakemake.output.card).write_text(json.dumps(card, indent=2, ensure_ascii=False), encoding="utf-8")
