"""Prepare an evaluation set.

Reads a ``.bin`` file of token ids, or texts. Writes a ``.bin`` file and its description (JSON). Fails if token ids are not in
the vocabulary of the base model's tokenizer.
"""

from longqlora.jobs.log import job_log

from longqlora.data.evaluation_sets import prepare_evaluation_set
from longqlora.data.tokenizers import load_tokenizer

with job_log(snakemake.log[0]):
    prepare_evaluation_set(
        sources=snakemake.params.sources,
        tokenizer=load_tokenizer(snakemake.params.tokenizer),
        output=snakemake.output.tokens,
    )
