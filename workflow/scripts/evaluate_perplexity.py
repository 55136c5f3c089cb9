"""Measure one cell of the table: the perplexity of a system on an evaluation set at a context length.

Reads a model and a token stream; writes a JSON record of the protocol and the result, and what each window lost (Parquet).
Fails when the stream was made with another tokenizer, or a loss is not a number.
"""

import json
from pathlib import Path

from longqlora.joblog import job_log

from longqlora.launching import launch
from longqlora.perplexity import evaluate_perplexity
from longqlora.provenance import digest_of_files, digest_of_values

with job_log(snakemake.log[0]):
    result = launch(
        evaluate_perplexity,
        num_processes=snakemake.params.num_processes,
        threads=snakemake.threads,
        label=snakemake.params.label,
        dataset_label=snakemake.params.dataset_label,
        model=snakemake.params.model,
        tokens_path=snakemake.input.tokens,
        protocol=snakemake.params.protocol,
        window=int(snakemake.wildcards.length),
        stride=snakemake.params.stride,
        device=snakemake.params.device,
        windows_path=snakemake.output.windows,
    )
    cell = {
        "system": snakemake.wildcards.system,
        "label": snakemake.params.label,
        "dataset": snakemake.wildcards.dataset,
        "dataset_label": snakemake.params.dataset_label,
        "context_length": int(snakemake.wildcards.length),
        "has_own_tokenizer": snakemake.params.has_own_tokenizer,
    }
    digests = {
        "code_digest": digest_of_files(snakemake.input.code),
        "config_digest": digest_of_values(dict(snakemake.params.items())),
    }
    Path(snakemake.output.record).write_text(json.dumps(cell | result | digests, indent=2, ensure_ascii=False))
