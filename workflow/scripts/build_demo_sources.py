"""Make the demo's texts from the Python standard library.

Writes corpus shards, one evaluation file per kind of text, and instruction records in four schemas (JSON lines).
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
    logging.info("texts: %s", counts)
    logging.info("instruction records: %s", write_instructions(snakemake.params.instructions))
