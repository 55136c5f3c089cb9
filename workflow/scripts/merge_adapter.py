"""Merge the adapter of one system into the base model.

Reads the base model, the adapter, its training card and the beginning of an evaluation set; writes a model folder that stock
transformers loads, with the certificate of the merge. Fails when the adapter is of another base model.
"""

import json
from pathlib import Path

from longqlora.joblog import job_log

from longqlora.certificate import merge_adapter

with job_log(snakemake.log[0]):
    merge_adapter(
        base_model=snakemake.params.base_model,
        adapter=snakemake.input.adapter,
        output=snakemake.output.model,
        label=snakemake.params.label,
        card=json.loads(Path(snakemake.input.card).read_text()),
        sample=snakemake.input.sample[0],
        device=snakemake.params.device,
    )
