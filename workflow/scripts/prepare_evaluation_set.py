"""Bring an evaluation set into the project's format.

Reads a ``.bin`` of token ids, or texts; writes a ``.bin`` and its description (JSON). Fails when a ``.bin`` was made with
another tokenizer.
"""

from longqlora.jobs.log import job_log

from transformers import AutoTokenizer

from longqlora.data.evaluation_sets import prepare_evaluation_set

with job_log(snakemake.log[0]):
    prepare_evaluation_set(
        sources=snakemake.params.sources,
        tokenizer=AutoTokenizer.from_pretrained(snakemake.params.tokenizer),
        output=snakemake.output.tokens,
    )
