"""Read one shard of the corpus and keep what the sample could need of it.

Reads files (local or remote) and the n-grams of the evaluation sets; writes the candidates and the priorities of all texts
that could be sampled (Parquet), and counts (JSON). Fails when a file is damaged, or of another form than expected.
"""

import json
from pathlib import Path

from longqlora.jobs.log import job_log

from transformers import AutoTokenizer

from longqlora.data.decontamination import EvaluationNgrams
from longqlora.data.readers import Fields
from longqlora.data.shards import SampleSettings, sample_shard

with job_log(snakemake.log[0]):
    source = snakemake.params.source
    card = sample_shard(
        settings=SampleSettings(**snakemake.params.settings),
        paths=snakemake.params.paths,
        part=snakemake.params.part,
        fields=Fields(source["text_field"], source["source_field"], tuple(source["metadata_fields"])),
        name=source["name"],
        stratum=source["name"] if "share" in source else None,
        tokenizer=AutoTokenizer.from_pretrained(snakemake.params.tokenizer),
        ngrams=EvaluationNgrams(snakemake.input.ngrams, snakemake.params.threshold),
        output=snakemake.output.candidates,
        priorities=snakemake.output.priorities,
    )
    Path(snakemake.output.card).write_text(json.dumps(card, indent=2, ensure_ascii=False))
