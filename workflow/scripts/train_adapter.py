"""Train the adapter of one system.

Reads the base model and a token stream or a tokenised instruction set; writes the adapter in peft's format, with
``training.json``. Fails when the base model's context cannot be extended to the target.
"""

from longqlora.joblog import job_log

from longqlora.training import train_adapter

with job_log(snakemake.log[0]):
    train_adapter(
        base_model=snakemake.params.base_model,
        data=snakemake.input.data,
        output=snakemake.output.adapter,
        context_length=snakemake.params.context_length,
        settings=snakemake.params.settings,
        seed=snakemake.params.seed,
        device=snakemake.params.device,
    )
