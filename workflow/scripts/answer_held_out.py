"""Let a fine-tuned model answer questions that were held out of its training.

Reads the merged model and the instruction set; writes questions, references and answers as JSON and Markdown.
"""

from longqlora.jobs.log import job_log

from longqlora.evaluation.answers import answer_held_out
from longqlora.jobs.gpus import reserve_gpus

with job_log(snakemake.log[0]), reserve_gpus(snakemake.params.device, 1):
    answer_held_out(
        model_path=snakemake.input.model,
        records=snakemake.input.records,
        held_out=snakemake.params.held_out,
        label=snakemake.params.label,
        device=snakemake.params.device,
        output=snakemake.output.answers,
        markdown=snakemake.output.markdown,
    )
