"""Encode an evaluation set anew for a published model with a tokenizer of its own.

Reads a token stream of the base model's tokenizer; writes one of the other tokenizer, document for document.
"""

from longqlora.jobs.log import job_log

from transformers import AutoTokenizer

from longqlora.data.evaluation_sets import retokenize

with job_log(snakemake.log[0]):
    retokenize(
        tokens=snakemake.input.tokens,
        tokenizer=AutoTokenizer.from_pretrained(snakemake.params.base_tokenizer),
        new_tokenizer=AutoTokenizer.from_pretrained(snakemake.params.tokenizer),
        output=snakemake.output.tokens,
    )
