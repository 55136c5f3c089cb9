"""Measure one cell of the table: the perplexity of a system on an evaluation set at a context length.

Reads a model and a token stream; writes a JSON record of the protocol and the result. Fails when the stream was made with
another tokenizer, or a loss is not a number.
"""

import json
from pathlib import Path

from longqlora.joblog import job_log

from longqlora.perplexity import evaluate_perplexity
from longqlora.provenance import digest_of_files, digest_of_values

with job_log(snakemake.log[0]):
    result = evaluate_perplexity(
        model_path=snakemake.params.model,
        rope_context=snakemake.params.rope_context,
        rope_scaling=snakemake.params.rope_scaling,
        tokens_path=snakemake.input.tokens,
        window=int(snakemake.wildcards.length),
        stride=snakemake.params.stride,
        precision=snakemake.params.precision,
        device=snakemake.params.device,
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
