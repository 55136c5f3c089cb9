"""Merge the adapter of one system into the base model.

Reads the base model, the adapter, its training card and the training data; writes the merged weights and the merge report
(JSON). Fails if the adapter is of another base model, or if the merge is clearly worse than the adapter as trained.
"""

import json
from pathlib import Path

from longqlora.jobs.log import importing, job_log

from longqlora.config.settings import MergeSettings
from longqlora.jobs.gpus import reserve_gpus

with job_log(snakemake.log[0]), reserve_gpus(snakemake.params.device, 1):
    with importing():  # bitsandbytes too, which starts CUDA: reserve GPUs first
        from longqlora.publishing.merge_report import MergeFiles, merge_adapter

    card = json.loads(Path(snakemake.input.card).read_text(encoding="utf-8"))
    report = merge_adapter(
        files=MergeFiles(
            base_model=card["base_model"],  # a model of the hub at the commit that was trained
            adapter=snakemake.input.adapter,
            data=snakemake.input.data,
            output=snakemake.output.weights,
        ),
        card=card,
        settings=MergeSettings(**snakemake.params.settings),
        device=snakemake.params.device,
    )
    Path(snakemake.output.report).write_text(json.dumps(report, indent=2), encoding="utf-8")
