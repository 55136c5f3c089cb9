"""Build the instruction set.

Reads records in their published schemas and the n-grams of the evaluation sets. Writes conversations (Parquet), a data card
(JSON), and the report on removed records (CSV). Fails if a source has too few records for its share, too many malformed
records, or a record of another schema.
"""

import json
from pathlib import Path

from longqlora.jobs.log import job_log

from longqlora.config.settings import SftSource
from longqlora.data.decontamination import EvaluationNgrams
from longqlora.data.instruction_set import SftSampleSettings, build_sft_set
from longqlora.data.tokenizers import load_tokenizer

with job_log(snakemake.log[0]):
    card = build_sft_set(
        sources=[SftSource(**source) for source in snakemake.params.sources],
        settings=SftSampleSettings(**snakemake.params.settings),
        tokenizer=load_tokenizer(snakemake.params.tokenizer),
        ngrams=EvaluationNgrams(snakemake.input.ngrams, snakemake.params.threshold),
        output=snakemake.output.records,
        removed=snakemake.output.removed,
    )
    Path(snakemake.output.card).write_text(json.dumps(card, indent=2, ensure_ascii=False), encoding="utf-8")
