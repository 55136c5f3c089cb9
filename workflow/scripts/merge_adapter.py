"""Merge the adapter of one system into the base model.

Reads the base model and the adapter; writes a model folder that stock transformers loads.
"""

from longqlora.joblog import job_log

from longqlora.merging import merge_adapter

with job_log(snakemake.log[0]):
    merge_adapter(
        base_model=snakemake.params.base_model,
        adapter=snakemake.input.adapter,
        output=snakemake.output.model,
        context_length=snakemake.params.context_length,
        is_chat_model=snakemake.params.is_chat_model,
    )
