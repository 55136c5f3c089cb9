"""Join the shards into the sample.

Reads what was kept of each shard; writes the sample (Parquet), its data card (JSON) and the report of removed texts (CSV).
Fails when there are too few texts of the wanted length, too many malformed records, or an overlap with an evaluation set.
"""

import json
from pathlib import Path

from longqlora.jobs.log import job_log

from longqlora.data.corpus import sample_corpus
from longqlora.data.decontamination import EvaluationNgrams
from longqlora.data.shards import SampleSettings

with job_log(snakemake.log[0]):
    card = sample_corpus(
        settings=SampleSettings(**snakemake.params.settings),
        shards=snakemake.input.shards,
        priorities=snakemake.input.priorities,
        cards=[json.loads(Path(path).read_text()) for path in snakemake.input.cards],
        **snakemake.params.joining,
        ngrams=EvaluationNgrams(snakemake.input.ngrams, snakemake.params.threshold),
        output=snakemake.output.texts,
        removed=snakemake.output.removed,
    )
    Path(snakemake.output.card).write_text(json.dumps(card, indent=2, ensure_ascii=False))
