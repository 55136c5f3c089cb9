"""Find the key tokens of LongPPL in every evaluation set.

Reads a model and token streams; writes the positions of the key tokens (Parquet) for each evaluation set. Fails if a stream was
made with another tokenizer, or the model's context is shorter than the longest evaluated length.
"""

from longqlora.jobs.log import job_log

from longqlora.config.settings import EvaluatedModel, Protocol
from longqlora.evaluation.key_tokens import find_key_tokens
from longqlora.jobs.gpus import reserve_gpus
from longqlora.modeling.scaling_choice import model_as_chosen, read_choice

with job_log(snakemake.log[0]), reserve_gpus(snakemake.params.device, 1):
    datasets = snakemake.params.datasets
    find_key_tokens(
        system=snakemake.wildcards.system,
        model=model_as_chosen(EvaluatedModel(**snakemake.params.model), read_choice(snakemake.input.scaling)),
        tokens=dict(zip(datasets, snakemake.input.tokens, strict=True)),
        protocol=Protocol(**snakemake.params.protocol),
        short_context=snakemake.params.short_context,
        device=snakemake.params.device,
        outputs=dict(zip(datasets, snakemake.output.key_tokens, strict=True)),
    )
