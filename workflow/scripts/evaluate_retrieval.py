"""Measure what a system finds again in texts of a context length, by task and depth.

Reads a model, its tokenizer and the token stream of an evaluation set; writes a JSON record. Fails when the length is too
short for a task.
"""

import json
from pathlib import Path

from longqlora.joblog import job_log

from longqlora.provenance import digest_of_files, digest_of_values
from longqlora.retrieval import evaluate_retrieval

with job_log(snakemake.log[0]):
    length = int(snakemake.wildcards.length)
    result = evaluate_retrieval(
        model=snakemake.params.model,
        tokenizer=snakemake.params.tokenizer,
        filler=snakemake.input.tokens,
        length=length,
        seed=snakemake.params.seed,
        device=snakemake.params.device,
        **snakemake.params.settings,
    )
    cell = {"system": snakemake.wildcards.system, "label": snakemake.params.label, "context_length": length}
    digests = {
        "code_digest": digest_of_files(snakemake.input.code),
        "config_digest": digest_of_values(dict(snakemake.params.items())),
    }
    Path(snakemake.output.record).write_text(json.dumps(cell | result | digests, indent=2, ensure_ascii=False))
