"""Train a tokenizer and a base model from scratch.

Reads texts; writes a model folder with weights, tokenizer and model card.
"""

from longqlora.jobs.log import job_log

from longqlora.config.settings import PretrainingSettings
from longqlora.training.pretraining import pretrain_model

with job_log(snakemake.log[0]):
    pretrain_model(
        settings=PretrainingSettings(**snakemake.params.settings),
        command=snakemake.params.command,
        output=snakemake.output.model,
        **snakemake.params.seed,
    )
