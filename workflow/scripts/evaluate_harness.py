"""Measure a system on a task of lm-evaluation-harness, at one length of its texts if it makes them.

Reads a model and its tokenizer, and what the task reads: data sets of the Hugging Face Hub, or the user's own files. Writes the
result (JSON).
"""

import json
from pathlib import Path

from longqlora.jobs.log import job_log

from longqlora.config.settings import EvaluatedModel, HarnessSettings
from longqlora.evaluation.harness import evaluate_harness
from longqlora.jobs.digests import stamp
from longqlora.jobs.gpus import reserve_gpus
from longqlora.modeling.scaling_choice import model_as_chosen, read_choice

with job_log(snakemake.log[0]), reserve_gpus(snakemake.params.device, 1):
    task, length = snakemake.params.task
    result = evaluate_harness(
        model=model_as_chosen(EvaluatedModel(**snakemake.params.model), read_choice(snakemake.input.scaling)),
        tokenizer=snakemake.params.tokenizer,
        is_trained_to_answer=snakemake.params.is_trained_to_answer,
        task=task,
        length=length,
        settings=HarnessSettings(**snakemake.params.settings),
        device=snakemake.params.device,
    )
    record = {"system": snakemake.wildcards.system, "requested": task} | result | stamp(snakemake.params)
    Path(snakemake.output.record).write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")
