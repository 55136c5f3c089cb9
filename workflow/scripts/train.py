"""Train one system: an adapter, or all weights of the model.

Reads the base model and a token stream or a tokenised instruction set; writes the adapter in peft's format or the model's
folder, TensorBoard events, and the training card (JSON). A rerun goes on from the last checkpoint. Fails, before weights are
loaded, when the base model cannot be extended or trained as the configuration asks.
"""

import json
import shutil
from pathlib import Path

from longqlora.joblog import job_log

from longqlora.launching import launch
from longqlora.training import train

with job_log(snakemake.log[0]):
    settings = snakemake.params.settings
    card = launch(
        train,
        num_processes=settings["num_processes"],
        threads=snakemake.threads,
        by_torchrun=settings["zero_stage"] > 0,
        label=snakemake.params.label,
        base_model=snakemake.params.base_model,
        data=snakemake.input.data,
        output=snakemake.output.trained,
        events=snakemake.output.events,
        work=snakemake.params.work,
        context_length=snakemake.params.context_length,
        rope_type=snakemake.params.rope_scaling,
        settings=settings,
        seed=snakemake.params.seed,
        device=snakemake.params.device,
    )
    Path(snakemake.output.card).write_text(json.dumps(card, indent=2))
    shutil.rmtree(snakemake.params.work)
