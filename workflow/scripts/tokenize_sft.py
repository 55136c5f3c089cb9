"""Tokenize the instruction set.

Reads conversations (Parquet). Writes token ids and labels (Arrow); the labels cover the answers only.
"""

from longqlora.jobs.log import job_log

from longqlora.data.instruction_set import tokenize_sft
from longqlora.data.tokenizers import load_tokenizer

with job_log(snakemake.log[0]):
    tokenize_sft(
        records=snakemake.input.records,
        tokenizer=load_tokenizer(snakemake.params.tokenizer),
        held_out=snakemake.params.held_out,
        output=snakemake.output.tokens,
    )
