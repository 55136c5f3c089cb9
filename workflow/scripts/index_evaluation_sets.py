"""Index the n-grams of all evaluation sets, so that training texts can be compared with them.

Reads the texts of the sets, or the token ids (``.bin``) of a set that is published so. Writes hashes of n-grams by evaluation
set (Parquet). Fails if a set is too short.
"""

import logging

from longqlora.jobs.log import job_log

from longqlora.data.decontamination import index_evaluation_sets
from longqlora.data.evaluation_sets import texts_of_evaluation_set
from longqlora.data.tokenizers import load_tokenizer

with job_log(snakemake.log[0]):
    tokenizer = load_tokenizer(snakemake.params.tokenizer)
    sets = zip(snakemake.params.sources.items(), snakemake.input.tokens, strict=True)
    counts = index_evaluation_sets(
        evaluation_sets={name: texts_of_evaluation_set(paths, tokens, tokenizer) for (name, paths), tokens in sets},
        n=snakemake.params.ngram_words,
        output=snakemake.output.ngrams,
    )
    logging.info("number of different n-grams: %s", counts)
