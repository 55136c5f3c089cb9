"""Train one system: an adapter, or all weights of the model.

Reads the base model and a token stream or a tokenized instruction set; writes the adapter in peft's format or the model's
weights, TensorBoard events and the training card (JSON). A rerun resumes from the last checkpoint. Fails before weights are
loaded if the base model cannot be extended or trained with the configured settings, or not in the memory of the device.
"""

import json
from pathlib import Path

from longqlora.jobs.log import importing, job_log

from longqlora.config.settings import ProgressSettings, RopeExtension, TrainingSettings
from longqlora.jobs.checkpoint_store import remove_checkpoints
from longqlora.jobs.gpus import reserve_gpus
from longqlora.jobs.launch import launch
from longqlora.modeling.scaling_choice import as_chosen, read_choice

settings = TrainingSettings(**snakemake.params.settings)
with job_log(snakemake.log[0]), reserve_gpus(snakemake.params.device, settings.num_processes):
    with importing():  # bitsandbytes too, which starts CUDA: reserve GPUs first
        from longqlora.planning.before_training import prepare_memory
        from longqlora.training.train import TrainingFiles, train

    choice = read_choice(snakemake.input.scaling)
    extension = as_chosen(RopeExtension(**snakemake.params.extension), choice)
    progress = ProgressSettings(**snakemake.params.progress)
    form = prepare_memory(
        snakemake.params.base_model, extension, settings, snakemake.params.device, check=progress.check_memory
    )
    card = launch(
        train,
        num_processes=settings.num_processes,
        num_nodes=settings.num_nodes,
        threads=snakemake.threads,
        by_torchrun=settings.zero_stage > 0,
        files=TrainingFiles(
            base_model=snakemake.params.base_model,
            data=snakemake.params.data,
            output=snakemake.output.trained,
            tensorboard_dir=snakemake.output.events,
            checkpoint_dir=snakemake.params.checkpoint_dir,
        ),
        extension=extension,
        settings=settings,
        progress=progress,
        device=snakemake.params.device,
        form=form,
        **snakemake.params.seed,
    )
    Path(snakemake.output.card).write_text(json.dumps(card | {"scaling_choice": choice}, indent=2), encoding="utf-8")
    remove_checkpoints(Path(snakemake.params.checkpoint_dir), progress.checkpoint_store)
