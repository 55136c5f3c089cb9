"""The settings of a training as transformers' trainer and DeepSpeed take them."""

import os
from typing import Any

import torch
from transformers import TrainingArguments

from longqlora.config.settings import ProgressSettings, TrainingSettings
from longqlora.modeling.devices import compute_dtype

WAITING, COPYING = 1800, 24 * 3600
"""Seconds that processes wait for each other; while one copies a checkpoint to its store, the others wait too."""


def training_arguments(
    output: str, settings: TrainingSettings, progress: ProgressSettings, seed: int, device: torch.device
) -> TrainingArguments:
    """Arguments of transformers' trainer.

    Args:
        output: folder of the adapter or the weights.
        settings: everything that changes the weights.
        progress: how often a line is logged and a checkpoint is written.
        seed: of the dropout and the order of the data.
        device: where the model is trained.
    """
    dtype = compute_dtype(device)
    length = {"num_train_epochs": settings.epochs} if settings.steps is None else {"max_steps": settings.steps}
    return TrainingArguments(
        output_dir=output,
        **length,
        ddp_timeout=COPYING if progress.checkpoint_store else WAITING,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=settings.warmup_steps,
        max_grad_norm=settings.max_grad_norm,
        weight_decay=settings.weight_decay,
        optim=settings.optimizer,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,  # with loss scaling
        use_cpu=device.type == "cpu",
        seed=seed,
        data_seed=seed,
        logging_steps=1,  # the training card has every step; LogProgress logs a line every progress.logging_steps
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all",
        disable_tqdm=True,  # jobs that run at the same time would overwrite each other's bars; LogProgress reports
        save_strategy="steps",
        save_steps=progress.checkpoint_steps,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        ddp_backend="gloo" if device.type == "cpu" and "RANK" in os.environ else None,  # torchrun sets RANK
        ddp_find_unused_parameters=False,
        deepspeed=deepspeed_config(settings.zero_stage, settings.offload) if settings.zero_stage else None,
    )


def deepspeed_config(stage: int, offload: bool) -> dict[str, Any]:
    """DeepSpeed's configuration: ZeRO-2 shards gradients and optimizer state over the processes, ZeRO-3 the weights too
    (Rajbhandari et al. 2020, arXiv 1910.02054).

    Args:
        stage: 2 or 3.
        offload: keep the optimizer state, with stage 3 the weights too, in CPU memory.
    """
    zero: dict[str, Any] = {"stage": stage}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        if offload:
            zero["offload_param"] = {"device": "cpu"}
    automatic = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # the optimizers of transformers
        "zero_force_ds_cpu_optimizer": False,  # otherwise offloading would refuse them
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        **dict.fromkeys(automatic, "auto"),
    }
