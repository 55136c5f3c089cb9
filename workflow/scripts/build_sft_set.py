"""Build the instruction set.

Reads records in their native schemas; writes conversations (Parquet), a data card (JSON) and the report of removed records
(CSV). Fails when a source has too few records for its share, or a record that its schema does not describe.
"""

import json
from pathlib import Path

from longqlora.jobs.log import job_log

from transformers import AutoTokenizer

from longqlora.data.decontamination import EvaluationNgrams
from longqlora.data.instruction_set import build_sft_set

with job_log(snakemake.log[0]):
    card = build_sft_set(
        sources=snakemake.params.sources,
        tokenizer=AutoTokenizer.from_pretrained(snakemake.params.tokenizer),
        **snakemake.params.settings,
        ngrams=EvaluationNgrams(snakemake.input.ngrams, snakemake.params.threshold),
        output=snakemake.output.records,
        removed=snakemake.output.removed,
    )
    Path(snakemake.output.card).write_text(json.dumps(card, indent=2, ensure_ascii=False))
