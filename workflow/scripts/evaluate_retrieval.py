"""Measure the retrieval accuracy of a system at one context length, by task and depth.

Reads a model, its tokenizer and the token stream of an evaluation set; writes the result (JSON). Fails if the length is too
short for a task.
"""

import json
from pathlib import Path

from longqlora.jobs.log import job_log

from longqlora.config.settings import EvaluatedModel, RetrievalSettings
from longqlora.evaluation.retrieval import evaluate_retrieval
from longqlora.jobs.digests import stamp
from longqlora.jobs.gpus import reserve_gpus
from longqlora.modeling.scaling_choice import model_as_chosen, read_choice

with job_log(snakemake.log[0]), reserve_gpus(snakemake.params.device, 1):
    length = int(snakemake.wildcards.length)
    result = evaluate_retrieval(
        model=model_as_chosen(EvaluatedModel(**snakemake.params.model), read_choice(snakemake.input.scaling)),
        untrained=snakemake.params.untrained,
        tokenizer=snakemake.params.tokenizer,
        is_trained_to_answer=snakemake.params.is_trained_to_answer,
        filler=snakemake.input.tokens[0],
        length=length,
        settings=RetrievalSettings(**snakemake.params.settings),
        device=snakemake.params.device,
    )
    cell = {"system": snakemake.wildcards.system, "eval_length": length}
    record = cell | result | stamp(snakemake.params)
    Path(snakemake.output.record).write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")
