"""Choose the RoPE scaling of the systems with rope_scaling: best.

Reads the base model and training data; writes the record of the choice (JSON), with the loss of the untrained model by each
scaling. Fails if the model cannot be extended to the target.
"""

import json
from pathlib import Path

from longqlora.jobs.log import importing, job_log

from longqlora.jobs.gpus import reserve_gpus

with job_log(snakemake.log[0]), reserve_gpus(snakemake.params.device, 1):
    with importing():  # bitsandbytes too, which starts CUDA: reserve GPUs first
        from longqlora.evaluation.choose_scaling import choose_scaling

    choice = choose_scaling(
        base_model=snakemake.params.base_model,
        data=snakemake.input.data,
        target_context=int(snakemake.wildcards.target),
        precision=snakemake.wildcards.precision,
        device=snakemake.params.device,
    )
    Path(snakemake.output.record).write_text(json.dumps(choice, indent=2), encoding="utf-8")
