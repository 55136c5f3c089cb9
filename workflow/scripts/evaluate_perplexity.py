"""Measure the perplexity of a system at one context length, on every evaluation set.

Reads a model, token streams and, for LongPPL, key tokens; writes one result (JSON) and the losses of the windows (Parquet) for
each evaluation set. Fails if a stream was made with another tokenizer, or a loss is not a number.
"""

import json
from pathlib import Path

from longqlora.jobs.log import job_log

from longqlora.config.settings import EvaluatedModel, Protocol
from longqlora.evaluation.perplexity import evaluate_perplexity
from longqlora.jobs.digests import stamp
from longqlora.jobs.gpus import reserve_gpus
from longqlora.jobs.launch import launch
from longqlora.modeling.scaling_choice import model_as_chosen, read_choice

with job_log(snakemake.log[0]), reserve_gpus(snakemake.params.device, snakemake.params.num_processes):
    datasets = snakemake.params.datasets
    results = launch(
        evaluate_perplexity,
        num_processes=snakemake.params.num_processes,
        threads=snakemake.threads,
        system=snakemake.wildcards.system,
        model=model_as_chosen(EvaluatedModel(**snakemake.params.model), read_choice(snakemake.input.scaling)),
        tokens=dict(zip(datasets, snakemake.input.tokens, strict=True)),
        protocol=Protocol(**snakemake.params.protocol),
        device=snakemake.params.device,
        windows=dict(zip(datasets, snakemake.output.windows, strict=True)),
        key_tokens=dict(zip(datasets, snakemake.input.key_tokens, strict=False)),  # there are none if LongPPL is not measured
    )
    for dataset, path in zip(datasets, snakemake.output.records, strict=True):
        cell = {
            "system": snakemake.wildcards.system,
            "dataset": dataset,
            "eval_length": int(snakemake.wildcards.length),
            "has_own_tokenizer": snakemake.params.has_own_tokenizer,
            "evaluator": snakemake.params.evaluator,
        }
        record = cell | results[dataset] | stamp(snakemake.params)
        Path(path).write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")
