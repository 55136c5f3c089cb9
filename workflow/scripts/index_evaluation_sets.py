"""Index the n-grams of all evaluation sets, so that training texts can be compared with them.

Reads token ids (``.bin``). Writes hashes of n-grams by evaluation set (Parquet). Fails if a set is too short.
"""

import logging

from longqlora.jobs.log import job_log

from longqlora.data.decontamination import index_evaluation_sets
from longqlora.data.tokenizers import load_tokenizer

with job_log(snakemake.log[0]):
    counts = index_evaluation_sets(
        evaluation_sets=dict(zip(snakemake.params.names, snakemake.input.tokens, strict=True)),
        tokenizer=load_tokenizer(snakemake.params.tokenizer),
        n=snakemake.params.ngram_words,
        output=snakemake.output.ngrams,
    )
    logging.info("number of different n-grams: %s", counts)
