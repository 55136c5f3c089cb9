"""Training a LoRA adapter on a 4-bit base (QLoRA, Dettmers et al. 2023, arXiv 2305.14314) at an extended context, with
shifted sparse attention: LongQLoRA (Yang 2023, arXiv 2311.04879)."""

import json
import logging
import resource
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from longqlora.attention import register_shifted_sparse_attention
from longqlora.models import autocast_dtype, find_device, load_config, load_model, use_chunked_loss
from longqlora.packing import load_training_data, pad_at_right
from longqlora.tokens import check_vocabulary

log = logging.getLogger(__name__)


class LogProgress(TrainerCallback):
    """Plain lines for the log file: step, loss, learning rate, tokens per second."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            rate = state.num_input_tokens_seen / (time.perf_counter() - self.started)
            line = "step %d of %d: loss %.4f, learning rate %.2e, %.0f tokens/s"
            log.info(line, state.global_step, state.max_steps, float(logs["loss"]), float(logs["learning_rate"]), rate)


def adapt(base_model: str, *, context_length: int, device: torch.device, settings: dict):
    """Load the base in 4 bit at the extended context and put a LoRA adapter on it.

    Args:
        base_model: directory or hub id.
        context_length: target context in tokens.
        settings: the experiment's ``training`` section (rank, alpha, dropout, target_modules, attention, …).
    """
    attention = "sdpa"
    if settings["attention"] == "shifted_sparse":
        attention = register_shifted_sparse_attention(settings["group_ratio"])
    model = load_model(base_model, device=device, precision="nf4", context_length=context_length, attn_implementation=attention)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        target_modules=settings["target_modules"],
    )
    return get_peft_model(use_chunked_loss(model), lora)


def training_arguments(work_folder: str, device: torch.device, seed: int, settings: dict) -> TrainingArguments:
    """The experiment's ``training`` section in the words of transformers' trainer."""
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
        fp16=dtype is torch.float16,
        activation_checkpointing=settings["activation_checkpointing"],
        activation_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=device.type == "cpu",
        seed=seed,
        data_seed=seed,
        logging_steps=settings["logging_steps"],
        include_num_input_tokens_seen="all",
        disable_tqdm=not sys.stderr.isatty(),
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
    )


def train_adapter(
    *, base_model: str, data: str, output: str, context_length: int, settings: dict, seed: int, device: str
) -> dict:
    """Train an adapter and write it to ``output`` in peft's format, with ``training.json`` (settings, loss trace, speed).

    Args:
        base_model: directory or hub id of a RoPE model.
        data: a ``.bin`` token stream, or the Arrow file of a tokenised instruction set.
        output: folder of the adapter.
        context_length: target context in tokens.
        settings: the experiment's ``training`` section.
        seed: of the adapter's weights, the dropout and the order of the data.
        device: ``cpu`` or ``cuda``.

    Returns:
        What ``training.json`` holds.

    Raises:
        ValueError: if the model's context cannot be extended to the target, the data were made with another tokenizer, or
            they cannot be packed as the settings ask.
    """
    where = find_device(device)
    vocab_size = load_config(base_model, context_length).vocab_size
    if data.endswith(".bin"):
        check_vocabulary(data, vocab_size)
    set_seed(seed)
    windows = load_training_data(
        data, context_length, isolate_documents=settings["isolate_documents"], pack_records=settings["pack_records"]
    )
    model = adapt(base_model, context_length=context_length, device=where, settings=settings)
    trainable, total = model.get_nb_trainable_parameters()
    log.info("%d windows of at most %d tokens; %d of %d parameters are trained", len(windows), context_length, trainable, total)
    trainer = Trainer(
        model=model,
        args=training_arguments(output, where, seed, settings),
        train_dataset=windows,
        data_collator=pad_at_right,
        callbacks=[LogProgress()],
    )
    trainer.remove_callback(PrinterCallback)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    model.save_pretrained(output)
    tokens = int(trainer.state.num_input_tokens_seen)
    card = {
        "base_model": base_model,
        "context_length": context_length,
        "settings": settings,
        "seed": seed,
        "trainable_parameters": trainable,
        "steps": trainer.state.global_step,
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds, 1),
        "peak_memory_bytes": peak_memory(where),
        "trace": [{k: row[k] for k in ("step", "loss", "learning_rate")} for row in trainer.state.log_history if "loss" in row],
    }
    (Path(output) / "training.json").write_text(json.dumps(card, indent=2))
    return card


def peak_memory(device: torch.device) -> int:
    """Largest memory in bytes that this process has held: of the GPU's allocator, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in kibibytes
