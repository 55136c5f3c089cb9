"""Training at an extended context, with shifted sparse attention: a LoRA adapter on a 4-bit base (LongQLoRA, Yang 2023,
arXiv 2311.04879; QLoRA, Dettmers et al. 2023, arXiv 2305.14314), a LoRA adapter on a 16-bit base with further modules trained
whole, or all weights (LongLoRA, Chen et al. 2023, arXiv 2309.12307)."""

import logging
import os
import resource
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    AutoConfig,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import TensorBoardCallback

from longqlora.attention import register_shifted_sparse_attention
from longqlora.compatibility import extension_problems
from longqlora.launching import deepspeed_config
from longqlora.merging import generation_config, save_tokenizer
from longqlora.model_card import model_card
from longqlora.models import autocast_dtype, find_device, load_model, name_of, stored_dtype, use_chunked_loss
from longqlora.packing import load_training_data
from longqlora.provenance import digest_of_file, machine, versions
from longqlora.resuming import ResumableTrainer, open_work_folder
from longqlora.tokens import check_vocabulary

log = logging.getLogger(__name__)

BASE_PRECISION = {"qlora": "nf4", "lora": "auto", "full": "float32"}
"""What each method keeps the base's weights in; weights that are trained are float32, under autocast."""
WITHOUT_EFFECT = ("logging_steps", "checkpoint_steps", "checkpoints_kept")
"""Settings that change nothing in what is trained: a run goes on where it was when one of them is another."""
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


@contextmanager
def memory_explained(context_length: int, settings: dict):
    """Say of an exhausted memory which settings to change.

    Raises:
        MemoryError: in the place of torch's own error.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise MemoryError(
            f"out of memory with context_length {context_length}, batch_size {settings['batch_size']}, rank "
            f"{settings['rank']}, method {settings['method']}, optimizer {settings['optimizer']}, activation_checkpointing "
            f"{settings['activation_checkpointing']}. In this order: a smaller batch_size with more gradient_accumulation (the "
            "result is the same), activation_checkpointing: true, attention: shifted_sparse, method: qlora, optimizer: "
            f"paged_adamw_8bit, offload_activations: true, a smaller rank, a shorter context_length. ({error})"
        ) from error


def make_trainable(base_model: str, *, context_length: int, rope_type: str, device: torch.device, settings: dict):
    """Load the base at the extended context, and make what the method trains trainable.

    Args:
        base_model: directory or hub id.
        context_length: target context in tokens.
        rope_type: see :func:`longqlora.positions.extend_context`.
        settings: the system's ``training`` section (method, rank, alpha, dropout, target_modules, attention, …).

    Returns:
        A model of transformers (method ``full``), or of peft with an adapter on it.
    """
    attention = "sdpa"
    if settings["attention"] == "shifted_sparse":
        attention = register_shifted_sparse_attention(settings["group_ratio"], context_length)
    model = load_model(
        base_model,
        device=device,
        precision=BASE_PRECISION[settings["method"]],
        context_length=context_length,
        rope_type=rope_type,
        attn_implementation=attention,
    )
    use_chunked_loss(model)
    return model if settings["method"] == "full" else add_adapter(model, settings)


def add_adapter(model: PreTrainedModel, settings: dict):
    """Freeze a model and put a LoRA adapter on it; the modules of ``modules_to_save`` are trained whole, as part of it.

    Args:
        settings: see :func:`make_trainable`.
    """
    if settings["method"] == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    trains_embeddings = any(name.split(".")[-1] == "embed_tokens" for name in settings["modules_to_save"])
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        target_modules=settings["target_modules"],
        modules_to_save=settings["modules_to_save"] or None,
        ensure_weight_tying=trains_embeddings and model.config.tie_word_embeddings,
    )
    model = get_peft_model(model, lora)
    for weight in model.parameters():
        # peft leaves copies of modules_to_save in 16 bit, where small updates would be lost; DeepSpeed has float32 of its own
        if weight.requires_grad and not settings["zero_stage"]:
            weight.data = weight.data.float()
    return model


def training_arguments(work_folder: str, device: torch.device, seed: int, settings: dict) -> TrainingArguments:
    """The system's ``training`` section in the words of transformers' trainer."""
    dtype = autocast_dtype(device)
    length = {"max_steps": settings["steps"]} if "steps" in settings else {"num_train_epochs": settings["epochs"]}
    return TrainingArguments(
        output_dir=work_folder,
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
        activation_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=device.type == "cpu",
        seed=seed,
        data_seed=seed,
        logging_steps=1,  # so that an interrupted run has the same trace; the log shows every logging_steps
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all",
        disable_tqdm=not sys.stderr.isatty(),
        save_strategy="steps",
        save_steps=settings["checkpoint_steps"],
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        ddp_backend="gloo" if device.type == "cpu" and "RANK" in os.environ else None,  # which torchrun sets
        ddp_find_unused_parameters=False,
        deepspeed=deepspeed_config(settings["zero_stage"], settings["offload"]) if settings["zero_stage"] else None,
    )


def train(
    *,
    label: str,
    base_model: str,
    data: str,
    output: str,
    events: str,
    work: str,
    context_length: int,
    rope_type: str,
    settings: dict,
    seed: int,
    device: str,
) -> dict:
    """Train one system and write what was trained to ``output``: an adapter in peft's format, or the whole model in the
    precision that the base is stored in, with tokenizer, generation settings and model card; the trainer's state beside it.

    Args:
        label: of the system.
        base_model: directory or hub id of a RoPE model.
        data: a ``.bin`` token stream, or the Arrow file of a tokenised instruction set.
        output: folder of the adapter or model.
        events: folder of the TensorBoard events.
        work: folder of the checkpoints; if it holds those of the same run, the training goes on from the newest.
        context_length: target context in tokens.
        rope_type: how it is reached, see :func:`longqlora.positions.extend_context`.
        settings: the system's ``training`` section.
        seed: of the adapter's weights, the dropout and the order of the data.
        device: ``cpu`` or ``cuda``.

    Returns:
        The training card: settings, digest of the data, versions, machine, tokens, time, peak memory, loss trace.

    Raises:
        ValueError: before weights are loaded, if the model cannot be extended and trained so (the message names both values),
            the data were made with another tokenizer, or cannot be packed as the settings ask; if DeepSpeed is missing.
        NonFiniteLoss, Interrupted, MemoryError, OSError: if the training or the writing of a checkpoint fails; see
            :mod:`longqlora.resuming`.
    """
    where, config = find_device(device), AutoConfig.from_pretrained(base_model)
    check_before_weights(base_model, config, data, context_length, settings)
    set_seed(seed)
    windows = load_training_data(
        data, context_length, isolate_documents=settings["isolate_documents"], pack_records=settings["pack_records"]
    )
    # before the model: with ZeRO-3 its weights are shared out among the processes while they are loaded
    arguments = training_arguments(output, where, seed, settings)
    model = make_trainable(base_model, context_length=context_length, rope_type=rope_type, device=where, settings=settings)
    trainable, total = (sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (False, True))
    log.info("%d windows of at most %d tokens; %d of %d parameters are trained", len(windows), context_length, trainable, total)
    identity = {
        "base_model": base_model,
        "config": config.to_json_string(),
        "data": digest_of_file(data),
        "context": [context_length, rope_type],
        "settings": {key: value for key, value in settings.items() if key not in WITHOUT_EFFECT},
        "seed": seed,
    }
    with arguments.main_process_first():
        work_folder = open_work_folder(work, identity)
    trainer = ResumableTrainer(
        work=work_folder,
        kept=settings["checkpoints_kept"],
        offload_activations=settings["offload_activations"],
        windows=windows,
        model=model,
        args=arguments,
        callbacks=[progress := LogProgress(settings["logging_steps"])],
    )
    if trainer.is_world_process_zero():
        trainer.add_callback(Events(SummaryWriter(events)))
    trainer.remove_callback(PrinterCallback)
    with memory_explained(context_length, settings):
        first_step = trainer.resume()
    card = {
        "base_model": base_model,
        "base_model_revision": getattr(config, "_commit_hash", None),
        "data": {"path": data, "sha256": identity["data"]},
        "context_length": context_length,
        "rope_scaling": rope_type,
        "settings": settings,
        "seed": seed,
        "versions": versions(),
        "machine": machine() | ({"gpu": torch.cuda.get_device_name(where)} if where.type == "cuda" else {}),
        "precision": {"base": BASE_PRECISION[settings["method"]], "autocast": name_of(autocast_dtype(where))},
        "trainable_parameters": trainable,
        "resumed_from_step": first_step,
        **progress.cost(trainer.state),
        "peak_memory_bytes": peak_memory(where),
        "trace": [{key: row.get(key) for key in TRACED} for row in trainer.state.log_history if "loss" in row],
    }
    if settings["method"] == "full":
        model.to(stored_dtype(config)).generation_config = generation_config(base_model, context_length)
        model.config.use_cache = config.use_cache  # the trainer switches it off
    trainer.save_model(output)  # gathers what ZeRO has shared out
    if trainer.is_world_process_zero():
        complete_output(Path(output), label, card, trainer.state)
    return card


def check_before_weights(base_model: str, config, data: str, context_length: int, settings: dict) -> None:
    """What can be told before weights are loaded: raise ValueError as :func:`train` says."""
    if settings["zero_stage"] and not find_spec("deepspeed"):
        stage = settings["zero_stage"]
        raise ValueError(
            f"training.zero_stage {stage} needs DeepSpeed, which is not installed: pip install deepspeed, or zero_stage: 0"
        )
    problems = list(extension_problems(config.to_dict(), context_length, settings))
    if problems:
        raise ValueError("\n".join(f"{base_model}: {problem}" for problem in problems))
    if data.endswith(".bin"):
        check_vocabulary(data, config.vocab_size)


def complete_output(output: Path, label: str, card: dict, state: TrainerState) -> None:
    """Write what goes beside the weights: the trainer's state and, where there is nothing to merge, so that this is the model
    that is published, its tokenizer and model card."""
    (output / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody needs
    state.save_to_json(str(output / "trainer_state.json"))
    if card["settings"]["method"] == "full":
        is_chat_model = card["settings"]["data"] == "sft"
        save_tokenizer(card["base_model"], str(output), context_length=card["context_length"], is_chat_model=is_chat_model)
        (output / "README.md").write_text(model_card(label, card), encoding="utf-8")


def peak_memory(device: torch.device) -> int:
    """Largest memory in bytes that this process has held: of the GPU's allocator, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in kibibytes
