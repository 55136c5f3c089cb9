"""Retokenize an evaluation set for a published model with a tokenizer of its own.

Reads token ids of the base model's tokenizer (``.bin``). Writes those of the other tokenizer, document by document, and their
description (JSON).
"""

from longqlora.jobs.log import job_log

from longqlora.data.evaluation_sets import retokenize_evaluation_set
from longqlora.data.tokenizers import load_tokenizer

with job_log(snakemake.log[0]):
    retokenize_evaluation_set(
        tokens=snakemake.input.tokens,
        tokenizer=load_tokenizer(snakemake.params.base_tokenizer),
        new_tokenizer=load_tokenizer(snakemake.params.tokenizer),
        output=snakemake.output.tokens,
    )
