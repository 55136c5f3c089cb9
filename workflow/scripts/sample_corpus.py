"""Sample long texts from the corpus.

Reads the sources (local or remote shards); writes the sample (Parquet) and its data card (JSON). Fails when the sources
hold too few texts of the wanted length, or a malformed record.
"""

import json
from pathlib import Path

from longqlora.joblog import job_log

from transformers import AutoTokenizer

from longqlora.sampling import sample_corpus

with job_log(snakemake.log[0]):
    card = sample_corpus(
        sources=snakemake.params.sources,
        text_field=snakemake.params.text_field,
        tokenizer=AutoTokenizer.from_pretrained(snakemake.params.tokenizer),
        num_texts=snakemake.params.num_texts,
        min_tokens=snakemake.params.min_tokens,
        max_tokens=snakemake.params.max_tokens,
        seed=snakemake.params.seed,
        output=snakemake.output.texts,
    )
    Path(snakemake.output.card).write_text(json.dumps(card, indent=2, ensure_ascii=False))
