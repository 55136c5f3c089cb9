"""Build the instruction set.

Reads records in their native schemas; writes conversations (Parquet) and a data card (JSON). Fails when a source has too
few records for its share, or a record that its schema does not describe.
"""

import json
from pathlib import Path

from longqlora.joblog import job_log

from transformers import AutoTokenizer

from longqlora.instructions import build_sft_set

with job_log(snakemake.log[0]):
    card = build_sft_set(
        sources=snakemake.params.sources,
        tokenizer=AutoTokenizer.from_pretrained(snakemake.params.tokenizer),
        num_records=snakemake.params.num_records,
        max_tokens=snakemake.params.max_tokens,
        seed=snakemake.params.seed,
        output=snakemake.output.records,
    )
    Path(snakemake.output.card).write_text(json.dumps(card, indent=2, ensure_ascii=False))
