"""Pre-train a model of the demo.

Reads corpus shards and the tokenizer; writes a model folder.
"""

from longqlora.jobs.log import job_log

from longqlora.config.settings import DemoArchitecture, DemoPretraining
from longqlora.training.pretraining import pretrain_model

with job_log(snakemake.log[0]):
    settings = snakemake.params.settings
    pretrain_model(
        shards=snakemake.input.shards,
        tokenizer=snakemake.input.tokenizer,
        output=snakemake.output.model,
        context_length=settings["context_length"],
        architecture=DemoArchitecture(**settings["architecture"]),
        pretraining=DemoPretraining(**settings["pretraining"]),
        seed=settings["seed"],
    )
