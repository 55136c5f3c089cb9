"""Training at an extended context, with shifted sparse attention: a LoRA adapter on a 4-bit base (LongQLoRA, Yang 2023,
arXiv 2311.04879; QLoRA, Dettmers et al. 2023, arXiv 2305.14314), a LoRA adapter on a 16-bit base with further modules trained
whole, or all weights (LongLoRA, Chen et al. 2023, arXiv 2309.12307)."""

import logging
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    AutoConfig,
    GenerationConfig,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import TensorBoardCallback

from longqlora.data.packing import load_training_data
from longqlora.data.token_files import check_vocabulary
from longqlora.jobs.checkpointing import open_checkpoint_folder
from longqlora.jobs.digests import FileFacts, digest_of_file
from longqlora.jobs.machine import machine, versions
from longqlora.jobs.memory import memory_explained, peak_memory
from longqlora.modeling.attention import register_shifted_sparse_attention
from longqlora.modeling.chunked_loss import use_chunked_loss
from longqlora.modeling.compatibility import extension_problems
from longqlora.modeling.devices import compute_dtype, find_device, name_of
from longqlora.modeling.loading import load_model, stored_dtype
from longqlora.training.adapters import add_adapter
from longqlora.training.trainer import ResumableTrainer, paged_bytes

log = logging.getLogger(__name__)

BASE_PRECISION = {"qlora": "nf4", "lora": "auto", "full": "float32"}
"""What each method keeps the base's weights in; weights that are trained are float32, under autocast."""
DEEPSPEED_MISSING = (
    "training.zero_stage {stage} needs DeepSpeed, which is not installed: pip install deepspeed ninja (with conda, add both to "
    "the pip section of environment.yml), or zero_stage: 0"
)
TRACED = ("step", "loss", "learning_rate", "grad_norm")


class LogProgress(TrainerCallback):
    """Plain lines for the log file, one every so many steps: step, loss, learning rate, tokens per second."""

    def __init__(self, every: int):
        self.every = every

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.tokens = time.perf_counter(), state.num_input_tokens_seen

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs and (state.global_step % self.every == 0 or state.global_step == state.max_steps):
            rate = (state.num_input_tokens_seen - self.tokens) / (time.perf_counter() - self.started)
            line = "step %d of %d: loss %.4f, learning rate %.2e, %.0f tokens/s"
            log.info(line, state.global_step, state.max_steps, float(logs["loss"]), float(logs["learning_rate"]), rate)

    def cost(self, state: TrainerState) -> dict:
        """Steps and tokens of the whole run; time and speed of this process's part of it."""
        seconds, tokens = time.perf_counter() - self.started, int(state.num_input_tokens_seen)
        return {
            "steps": state.global_step,
            "tokens": tokens,
            "seconds": round(seconds, 1),
            "tokens_per_second": round((tokens - self.tokens) / seconds, 1),
        }


class Events(TensorBoardCallback):
    """TensorBoard's events, the ones of the steps before an interruption as well."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        for row in state.log_history:
            for name in TRACED[1:]:
                if name in row:
                    self.tb_writer.add_scalar(f"train/{name}", row[name], row["step"])


def memory_advice(target_context: int, settings: dict) -> tuple[str, str]:
    """What a training was doing when memory was exhausted, and which settings to change, as
    :func:`longqlora.jobs.memory.memory_explained` takes them."""
    return (
        f"with target_context {target_context}, batch_size {settings['batch_size']}, rank {settings['rank']}, method "
        f"{settings['method']}, optimizer {settings['optimizer']}, activation_checkpointing "
        f"{settings['activation_checkpointing']}",
        "In this order: a smaller batch_size with more gradient_accumulation (the result is the same), "
        "activation_checkpointing: true, offload_activations: true, method: qlora, optimizer: paged_adamw_8bit, "
        "a smaller rank, a shorter target_context.",
    )


def make_trainable(base_model: str, *, target_context: int, rope_scaling: str, device: torch.device, settings: dict):
    """Load the base at the extended context, and make what the method trains trainable.

    Args:
        base_model: directory or hub id.
        target_context: target context in tokens.
        rope_scaling: see :func:`longqlora.modeling.rope.extend_context`.
        settings: the system's ``training`` section (method, rank, alpha, dropout, target_modules, attention, …).

    Returns:
        A model of transformers (method ``full``), or of peft with an adapter on it.
    """
    attention = "sdpa"
    if settings["attention"] == "shifted_sparse":
        attention = register_shifted_sparse_attention(settings["group_ratio"], target_context)
    model = load_model(
        base_model,
        device=device,
        precision=BASE_PRECISION[settings["method"]],
        target_context=target_context,
        rope_scaling=rope_scaling,
        attn_implementation=attention,
    )
    use_chunked_loss(model)
    return model if settings["method"] == "full" else add_adapter(model, settings)


def training_arguments(output: str, device: torch.device, seed: int, settings: dict, progress: dict) -> TrainingArguments:
    """The system's ``training`` section in the words of transformers' trainer."""
    dtype = compute_dtype(device)
    length = {"max_steps": settings["steps"]} if "steps" in settings else {"num_train_epochs": settings["epochs"]}
    return TrainingArguments(
        output_dir=output,
        **length,
        per_device_train_batch_size=settings["batch_size"],
        gradient_accumulation_steps=settings["gradient_accumulation"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=settings["warmup_steps"],
        max_grad_norm=settings["max_grad_norm"],
        weight_decay=settings["weight_decay"],
        optim=settings["optimizer"],
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,  # with loss scaling
        activation_checkpointing=settings["activation_checkpointing"],
        activation_checkpointing_kwargs={
            "use_reentrant": False,
            "offload": settings["offload_activations"] and device.type == "cuda",  # on a CPU they are there already
        },
        use_cpu=device.type == "cpu",
        seed=seed,
        data_seed=seed,
        logging_steps=1,  # so that an interrupted run has the same trace; the log shows every logging_steps
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all",
        disable_tqdm=not sys.stderr.isatty(),
        save_strategy="steps",
        save_steps=progress["checkpoint_steps"],
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        ddp_backend="gloo" if device.type == "cpu" and "RANK" in os.environ else None,  # which torchrun sets
        ddp_find_unused_parameters=False,
        deepspeed=deepspeed_config(settings["zero_stage"], settings["offload"]) if settings["zero_stage"] else None,
    )


def deepspeed_config(stage: int, offload: bool) -> dict:
    """DeepSpeed's configuration: ZeRO-2 shards gradients and the optimizer's state, ZeRO-3 the weights too (Rajbhandari et al.
    2020, arXiv 1910.02054).

    Args:
        stage: 2 or 3.
        offload: keep the optimizer's state, with stage 3 the weights too, in CPU memory.
    """
    zero = {"stage": stage}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        if offload:
            zero["offload_param"] = {"device": "cpu"}
    automatic = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # those of transformers
        "zero_force_ds_cpu_optimizer": False,  # else offloading would refuse them
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        **dict.fromkeys(automatic, "auto"),
    }


def train(
    *,
    base_model: str,
    data: str,
    output: str,
    events: str,
    checkpoint_dir: str,
    target_context: int,
    rope_scaling: str,
    settings: dict,
    progress: dict,
    seed: int,
    device: str,
) -> dict:
    """Train one system and write what was trained to ``output``: an adapter in peft's format, or the weights of the whole model
    in the precision that the base is stored in; the trainer's state beside it.

    Args:
        base_model: directory or hub id of a RoPE model.
        data: a ``.bin`` token stream, or the Arrow file of a tokenised instruction set.
        output: folder of the adapter or the weights.
        events: folder of the TensorBoard events.
        checkpoint_dir: folder of the checkpoints; if it holds those of the same run, the training resumes from the newest.
        target_context: target context in tokens.
        rope_scaling: how it is reached, see :func:`longqlora.modeling.rope.extend_context`.
        settings: the system's ``training`` section.
        progress: logging_steps, checkpoint_steps and checkpoints_kept, which change nothing in what is trained.
        seed: of the adapter's weights, the dropout and the order of the data.
        device: ``cpu`` or ``cuda``.

    Returns:
        The training card: settings, digest of the data, versions, machine, tokens, time, peak memory, loss trace.

    Raises:
        ValueError: before weights are loaded, if the model cannot be extended and trained so (the message names both values),
            the data were made with another tokenizer, or cannot be packed as the settings ask; if DeepSpeed is missing.
        NonFiniteLoss, Interrupted, MemoryError, OSError: if the training or the writing of a checkpoint fails; see
            :mod:`longqlora.training.trainer`.
    """
    where, config = find_device(device), AutoConfig.from_pretrained(base_model)
    check_before_weights(base_model, config, data, target_context, settings)
    set_seed(seed)
    windows = load_training_data(
        data, target_context, isolate_documents=settings["isolate_documents"], pack_records=settings["pack_records"]
    )
    # before the model: with ZeRO-3 its weights are shared out among the processes while they are loaded
    arguments = training_arguments(output, where, seed, settings, progress)
    run = {
        "base_model": base_model,
        "base_model_revision": getattr(config, "_commit_hash", None),
        "base_model_contents": contents_of_weights(base_model),
        "data": {"path": data, "sha256": digest_of_file(data), "windows": len(windows)},
        "target_context": target_context,
        "rope_scaling": rope_scaling,
        "settings": settings,
        "seed": seed,
    }
    with arguments.main_process_first():
        checkpoint_folder = open_checkpoint_folder(checkpoint_dir, run | {"config": config.to_json_string()})
    with memory_explained(*memory_advice(target_context, settings)):
        model = make_trainable(
            base_model, target_context=target_context, rope_scaling=rope_scaling, device=where, settings=settings
        )
        trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        log.info("%d windows of at most %d tokens; %d parameters are trained", len(windows), target_context, trainable)
        trainer = ResumableTrainer(
            checkpoint_dir=checkpoint_folder,
            kept=progress["checkpoints_kept"],
            windows=windows,
            model=model,
            args=arguments,
            callbacks=[log_progress := LogProgress(progress["logging_steps"])],
        )
        if trainer.is_world_process_zero():
            trainer.add_callback(Events(SummaryWriter(events)))
        trainer.remove_callback(PrinterCallback)
        first_step = trainer.resume()
    save_trained(trainer, config, output)
    return {
        **run,
        "versions": versions(),
        "machine": machine() | ({"gpu": torch.cuda.get_device_name(where)} if where.type == "cuda" else {}),
        "precision": {"base": BASE_PRECISION[settings["method"]], "autocast": name_of(compute_dtype(where))},
        "trainable_parameters": trainable,
        "resumed_from_step": first_step,
        **log_progress.cost(trainer.state),
        **peak_memory(where),
        "paged_optimizer_bytes": paged_bytes(trainer.optimizer),
        "trace": [{key: row.get(key) for key in TRACED} for row in trainer.state.log_history if "loss" in row],
    }


def contents_of_weights(base_model: str) -> str:
    """Names and digest of the weights of a model's folder, so that no run resumes on others; of a hub id there are none."""
    folder = Path(base_model)
    return FileFacts().fingerprint(sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]))


def save_trained(trainer: ResumableTrainer, config, output: str) -> None:
    """Write an adapter, or the weights of a whole model in the precision that the base is stored in, and the trainer's state.

    Args:
        config: of the base model.
        output: folder.
    """
    if isinstance(trainer.model, PreTrainedModel):
        trainer.model.to(stored_dtype(config)).generation_config = GenerationConfig()  # publishing writes the base's
        trainer.model.config.use_cache = config.use_cache  # the trainer switches it off
    trainer.save_model(output)  # gathers what ZeRO has shared out
    if trainer.is_world_process_zero():
        (Path(output) / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody needs
        trainer.state.save_to_json(str(Path(output) / "trainer_state.json"))


def check_before_weights(base_model: str, config, data: str, target_context: int, settings: dict) -> None:
    """What can be told before weights are loaded: raise ValueError as :func:`train` says."""
    if settings["zero_stage"] and not find_spec("deepspeed"):
        raise ValueError(DEEPSPEED_MISSING.format(stage=settings["zero_stage"]))
    problems = list(extension_problems(config.to_dict(), target_context, settings))
    if problems:
        raise ValueError("\n".join(f"{base_model}: {problem}" for problem in problems))
    if data.endswith(".bin"):
        check_vocabulary(data, config.vocab_size)
