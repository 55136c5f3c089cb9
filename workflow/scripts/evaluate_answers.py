"""Measure the loss of a fine-tuned system on the answers of held-out conversations, before and after its fine-tuning.

Reads the model that was trained, the system's model, and the instruction set; writes the result (JSON), with sample answers.
"""

import json
from pathlib import Path

from longqlora.jobs.log import job_log

from longqlora.config.settings import EvaluatedModel
from longqlora.evaluation.answers import evaluate_answers
from longqlora.jobs.digests import stamp
from longqlora.jobs.gpus import reserve_gpus
from longqlora.modeling.scaling_choice import model_as_chosen, read_choice

with job_log(snakemake.log[0]), reserve_gpus(snakemake.params.device, 1):
    choice = read_choice(snakemake.input.scaling)
    result = evaluate_answers(
        untrained=model_as_chosen(EvaluatedModel(**snakemake.params.untrained), choice),
        trained=model_as_chosen(EvaluatedModel(**snakemake.params.model), choice),
        base_model=snakemake.params.base_model,
        tokenizer=snakemake.params.tokenizer,
        records=snakemake.input.records,
        held_out=snakemake.params.held_out,
        device=snakemake.params.device,
    )
    record = {"system": snakemake.wildcards.system} | result | stamp(snakemake.params)
    Path(snakemake.output.record).write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")
