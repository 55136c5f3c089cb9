"""Index the n-grams of all evaluation sets, so that training texts can be compared with them.

Reads token ids (``.bin``). Writes hashes of n-grams by evaluation set (Parquet). Fails if a set is too short.
"""

import logging

from longqlora.jobs.log import job_log

from transformers import AutoTokenizer

from longqlora.data.decontamination import index_evaluation_sets

with job_log(snakemake.log[0]):
    counts = index_evaluation_sets(
        evaluation_sets=dict(zip(snakemake.params.names, snakemake.input.tokens, strict=True)),
        tokenizer=AutoTokenizer.from_pretrained(snakemake.params.tokenizer),
        n=snakemake.params.ngram_words,
        output=snakemake.output.ngrams,
    )
    logging.info("number of different n-grams: %s", counts)
