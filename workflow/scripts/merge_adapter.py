"""Merge the adapter of one system into the base model.

Reads the base model, the adapter, its training card and the training data; writes the weights of the merged model and the merge
report (JSON). Fails when the adapter is of another base model, or the merge is clearly worse than the adapter as trained.
"""

import json
from pathlib import Path

from longqlora.jobs.log import job_log

from longqlora.jobs.gpus import reserve_gpus

with job_log(snakemake.log[0]), reserve_gpus(snakemake.params.device, 1):
    from longqlora.publishing.merge_report import merge_adapter  # bitsandbytes starts CUDA when it is imported

    report = merge_adapter(
        base_model=snakemake.params.base_model,
        adapter=snakemake.input.adapter,
        output=snakemake.output.weights,
        card=json.loads(Path(snakemake.input.card).read_text()),
        data=snakemake.input.data,
        device=snakemake.params.device,
        **snakemake.params.settings,
    )
    Path(snakemake.output.report).write_text(json.dumps(report, indent=2))
