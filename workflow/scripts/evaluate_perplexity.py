"""Measure one cell of the table: the perplexity of a system on an evaluation set at one context length.

Reads a model and a token stream; writes the result (JSON) and the losses of the windows (Parquet). Fails if the stream was made
with another tokenizer, or a loss is not a number.
"""

import json
from pathlib import Path

from longqlora.jobs.log import job_log

from longqlora.config.settings import EvaluatedModel, Protocol
from longqlora.evaluation.perplexity import evaluate_perplexity
from longqlora.jobs.digests import stamp
from longqlora.jobs.gpus import reserve_gpus
from longqlora.jobs.launch import launch

with job_log(snakemake.log[0]), reserve_gpus(snakemake.params.device, snakemake.params.num_processes):
    result = launch(
        evaluate_perplexity,
        num_processes=snakemake.params.num_processes,
        threads=snakemake.threads,
        system=snakemake.wildcards.system,
        dataset=snakemake.wildcards.dataset,
        model=EvaluatedModel(**snakemake.params.model),
        tokens_path=snakemake.input.tokens,
        protocol=Protocol(**snakemake.params.protocol),
        device=snakemake.params.device,
        windows_path=snakemake.output.windows,
    )
    cell = {
        "system": snakemake.wildcards.system,
        "dataset": snakemake.wildcards.dataset,
        "eval_length": int(snakemake.wildcards.length),
        "has_own_tokenizer": snakemake.params.has_own_tokenizer,
    }
    record = cell | result | stamp(snakemake.params)
    Path(snakemake.output.record).write_text(json.dumps(record, indent=2, ensure_ascii=False))
