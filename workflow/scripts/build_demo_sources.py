"""Make the demo's texts from the Python standard library.

Writes the corpus in shards, one evaluation set per kind of text, and four files of instruction records (all JSON lines).
"""

import logging

from longqlora.jobs.log import job_log

from longqlora.data.demo_texts import write_corpus, write_instructions

with job_log(snakemake.log[0]):
    counts = write_corpus(
        shards=snakemake.params.shards,
        evaluation_sets=snakemake.params.evaluation_sets,
        **snakemake.params.settings,
    )
    logging.info("documents and characters: %s", counts)
    logging.info("instruction records: %s", write_instructions(snakemake.params.instructions))
