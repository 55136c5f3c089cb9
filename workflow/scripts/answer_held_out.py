"""Let a fine-tuned model answer questions that were held out of its training.

Reads the merged model and the instruction set; writes questions, references and answers as JSON and Markdown.
"""

import json
from pathlib import Path

from longqlora.jobs.log import job_log

from longqlora.evaluation.answers import answer_held_out, render_answers
from longqlora.jobs.gpus import reserve_gpus

with job_log(snakemake.log[0]), reserve_gpus(snakemake.params.device, 1):
    answers = answer_held_out(
        model_path=snakemake.input.model,
        records=snakemake.input.records,
        held_out=snakemake.params.held_out,
        device=snakemake.params.device,
    )
    Path(snakemake.output.answers).write_text(json.dumps(answers, indent=2, ensure_ascii=False))
    Path(snakemake.output.markdown).write_text(render_answers(snakemake.params.label, answers), encoding="utf-8")
