"""Training at an extended context, by one of three methods:

* ``qlora``: a LoRA adapter on a 4-bit base (LongQLoRA, Yang 2023, arXiv 2311.04879; QLoRA, Dettmers et al. 2023,
  arXiv 2305.14314);
* ``lora``: a LoRA adapter on a 16-bit base, with further modules trained in full (LongLoRA, Chen et al. 2023,
  arXiv 2309.12307);
* ``full``: all weights.
"""

import logging
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.tensorboard import SummaryWriter
from transformers import GenerationConfig, PrinterCallback, TrainingArguments, set_seed

from longqlora.config.settings import Device, ProgressSettings, RopeExtension, TrainingSettings
from longqlora.data.hub import is_hub_id, pinned_model, split_revision
from longqlora.data.packing import TrainingData, largest_id, load_training_data
from longqlora.data.pose import PoseWindows
from longqlora.data.token_files import check_token
from longqlora.jobs.checkpoint_store import CheckpointStore
from longqlora.jobs.checkpointing import open_checkpoint_folder
from longqlora.jobs.digests import FileFacts, digest_of_file
from longqlora.jobs.machine import machine, versions
from longqlora.jobs.memory import memory_explained, peak_memory
from longqlora.modeling.attention import register_full_attention, register_shifted_sparse_attention
from longqlora.modeling.base_precision import BASE_PRECISION
from longqlora.modeling.chunked_loss import use_chunked_loss
from longqlora.modeling.compatibility import extension_problems, quantization_problems
from longqlora.modeling.devices import compute_dtype, dtype_name, find_device, keep_freed_memory
from longqlora.modeling.loading import load_config, load_model, stored_dtype
from longqlora.modeling.model_files import weight_files
from longqlora.modeling.rope import scaling_problems
from longqlora.modeling.shared_attention import register_shared_attention
from longqlora.training.activations import Form, keep_activations
from longqlora.training.adapters import FLOAT32, add_adapter, base_dtypes
from longqlora.training.arguments import training_arguments
from longqlora.training.progress import LogProgress, ResumableTensorBoard, trace_of
from longqlora.training.trainer import (
    FullAttentionAtTheEnd,
    OtherSkipsEachEpoch,
    ResumableTrainer,
    paged_state_bytes,
)

log = logging.getLogger(__name__)

DEEPSPEED_MISSING = (
    "training.zero_stage {stage} needs DeepSpeed, which is not installed: pip install deepspeed ninja (with conda, add both to "
    "the pip section of environment.yml), or zero_stage: 0"
)


@dataclass(frozen=True)
class TrainingFiles:
    """The inputs and outputs of a training.

    Attributes:
        base_model: directory or hub id of the model to train, see :mod:`longqlora.data.hub`.
        data: ``.bin`` file of token ids, or the Arrow file of a tokenized instruction set.
        output: folder for the adapter or the weights.
        tensorboard_dir: folder for the TensorBoard event files.
        checkpoint_dir: folder for the checkpoints; if it or the store (``progress.checkpoint_store``) holds some of the same
            run, the training resumes from the newest.
    """

    base_model: str
    data: str
    output: str
    tensorboard_dir: str
    checkpoint_dir: str


def train(
    *,
    files: TrainingFiles,
    extension: RopeExtension,
    settings: TrainingSettings,
    progress: ProgressSettings,
    seed: int,
    device: Device,
    form: Form,
) -> dict:
    """Train one system. Writes an adapter in peft's format, or all weights in the precision that the base is stored in, and
    the trainer's state next to them.

    Args:
        files: inputs and outputs.
        extension: how the context is extended.
        settings: everything that changes the weights.
        progress: how often a line is logged and a checkpoint is written, and where it is copied to.
        seed: of the adapter's initial weights, the dropout and the order of the data.
        device: where the model is trained.
        form: which activations are kept, see :mod:`longqlora.training.activations`.

    Returns:
        The training card: settings, digest of the data, versions, machine, tokens, time, peak memory, loss per step.

    Raises:
        ValueError: before weights are loaded, if the model cannot be extended and trained with these settings, the data hold
            token ids that the model does not have, or DeepSpeed is missing.
        NonFiniteLoss, Interrupted, MemoryError, OSError: see :mod:`longqlora.training.trainer`.
    """
    files = replace(files, base_model=pinned_model(files.base_model))
    torch_device, config = find_device(device), load_config(files.base_model)
    keep_freed_memory(torch_device)
    check_before_loading(files, config, extension, settings)
    set_seed(seed)
    windows = load_windows(files.data, extension, settings, seed)
    # before the model is loaded: ZeRO-3 shards its weights over the processes during loading
    arguments = training_arguments(files.output, settings, progress, seed, torch_device)
    run = describe_run(files, len(windows), extension, settings, seed)
    with arguments.main_process_first(local=False):  # nodes share the folder
        checkpoint_dir = open_checkpoint_folder(files.checkpoint_dir, run | {"config": config.to_json_string()})
        is_first = arguments.process_index == 0
        store = CheckpointStore(progress.checkpoint_store, checkpoint_dir) if progress.checkpoint_store and is_first else None
    with memory_explained(*memory_advice(extension, settings, form)):
        model = make_trainable(files.base_model, extension, settings, torch_device)
        keep_activations(model, form, tiles=settings.zero_stage != 3)
        trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        log.info("%d windows of at most %d tokens", len(windows), settings.pose_window or extension.target_context)
        log.info("%d parameters are trained; activations kept: %s", trainable, form)
        trainer = make_trainer(model, windows, checkpoint_dir, store, settings, arguments)
        log_progress = report_progress(trainer, files.tensorboard_dir, progress)
        first_step = trainer.resume()
    save_trained(trainer, config, files.output)
    return {
        **run,
        "settings": settings.model_dump(),
        "activations": form,
        "versions": versions(),
        "machine": machine() | ({"gpu": torch.cuda.get_device_name(torch_device)} if torch_device.type == "cuda" else {}),
        "precision": {"base": BASE_PRECISION[settings.method], "autocast": dtype_name(compute_dtype(torch_device))},
        "trainable_parameters": trainable,
        "resumed_from_step": first_step,
        **log_progress.cost(trainer.state),
        **peak_memory(torch_device),
        "paged_optimizer_bytes": paged_state_bytes(trainer.optimizer),
        "trace": trace_of(trainer.state),
    }


def check_before_loading(files: TrainingFiles, config, extension: RopeExtension, settings: TrainingSettings) -> None:
    """Check all that can be checked before weights are loaded.

    Args:
        files, extension, settings: see :func:`train`.
        config: of the base model.

    Raises:
        ValueError: see :func:`train`.
    """
    if settings.zero_stage and not find_spec("deepspeed"):
        raise ValueError(DEEPSPEED_MISSING.format(stage=settings.zero_stage))
    model = config.to_dict()
    problems = [
        *extension_problems(model, extension.target_context, settings),
        *scaling_problems(model, extension),
        *quantization_problems(model, trained=True, precision="auto"),
    ]
    if problems:
        raise ValueError("\n".join(f"{files.base_model}: {problem}" for problem in problems))
    check_token(files.data, largest_id(files.data), config.vocab_size, files.base_model)


def load_windows(data: str, extension: RopeExtension, settings: TrainingSettings, seed: int) -> TrainingData:
    """The windows to train on, without the end of the data that is held out.

    Args:
        data: see :class:`TrainingFiles`.
        extension: how the context is extended.
        settings: how the windows are made.
        seed: of the skips of PoSE.
    """
    if settings.pose_window:
        return PoseWindows(data, settings.pose_window, target_context=extension.target_context, seed=seed)
    packing = {"isolate_documents": settings.isolate_documents, "pack_records": settings.pack_records}
    return load_training_data(data, extension.target_context, **packing)


def describe_run(
    files: TrainingFiles, num_windows: int, extension: RopeExtension, settings: TrainingSettings, seed: int
) -> dict:
    """Everything that the trained weights depend on, but for which activations are kept, which changes rounding and dropout's
    draws alone. A training resumes only from checkpoints of an equal description."""
    is_remote = is_hub_id(files.base_model)  # and at a commit, which decides its contents
    return {
        "base_model": files.base_model,
        "base_model_contents": None if is_remote else FileFacts().fingerprint(weight_files(Path(files.base_model))),
        "data": {"path": files.data, "sha256": digest_of_file(files.data), "windows": num_windows},
        "target_context": extension.target_context,
        "rope_scaling": extension.scaling,
        "rope_factor": extension.factor,
        "rope_theta": extension.theta,
        "settings": settings.model_dump(exclude={"memory"}),
        "seed": seed,
    }


def make_trainable(base_model: str, extension: RopeExtension, settings: TrainingSettings, device: torch.device):
    """Load the base at the extended context, and make trainable what the method trains.

    Args:
        base_model: directory or hub id.
        extension: how the context is extended.
        settings: method, adapter and attention.
        device: where the model is trained.

    Returns:
        A model of transformers (method ``full``), or one of peft with an adapter.
    """
    attention = register_full_attention()
    if settings.attention == "shifted_sparse":
        attention = register_shifted_sparse_attention(settings.group_ratio, extension.target_context)
    model: Any = load_model(
        base_model,
        device=device,
        precision=BASE_PRECISION[settings.method],
        extension=extension,
        attn_implementation=attention,
    )
    use_chunked_loss(model)
    if settings.method != "full":
        # DeepSpeed casts the whole model itself, and keeps float32 copies of the trained weights
        dtypes = FLOAT32 if settings.zero_stage else base_dtypes(device)
        model = add_adapter(
            model,
            settings,
            base=dtypes if settings.method == "qlora" else None,
            trained=None if settings.zero_stage else torch.float32,
            revision=split_revision(base_model)[1] if is_hub_id(base_model) else None,
        )
    return model


def share_windows(model, sequence_parallel: int) -> str:
    """Let processes share the windows of a model if there are to be several for each window: ranks that follow each other.

    Args:
        model: of transformers, with its adapter if it has one.
        sequence_parallel: how many processes share a window.

    Returns:
        The name of the full attention that the model can be given.
    """
    full = register_full_attention()
    if sequence_parallel == 1:
        return full
    group, _ = torch.distributed.new_subgroups(sequence_parallel)
    shared = {name: register_shared_attention(name, group) for name in {full, model.config._attn_implementation}}
    model.set_attn_implementation(shared[model.config._attn_implementation])
    return shared[full]


def memory_advice(extension: RopeExtension, settings: TrainingSettings, form: Form) -> tuple[str, str]:
    """The training in words, and which settings to change when memory is exhausted, as arguments of
    :func:`longqlora.jobs.memory.memory_explained`."""
    window, length = "target_context", extension.target_context
    if settings.pose_window:
        window, length = "pose_window", settings.pose_window
    return (
        f"with {window} {length}, batch_size {settings.batch_size}, rank {settings.rank}, "
        f"method {settings.method}, optimizer {settings.optimizer}, memory {settings.memory} (activations kept: {form})",
        "In this order: a smaller batch_size with more gradient_accumulation (the result is the same), "
        "memory: smallest, method: qlora, optimizer: paged_adamw_8bit, a smaller rank, "
        f"a shorter {window}.",
    )


def make_trainer(
    model,
    windows: TrainingData,
    checkpoint_dir: Path,
    store: CheckpointStore | None,
    settings: TrainingSettings,
    arguments: TrainingArguments,
) -> ResumableTrainer:
    """The trainer, with what changes during the training: the attention at its end, the skips of PoSE in each epoch."""
    full_attention = share_windows(model, settings.sequence_parallel)
    trainer = ResumableTrainer(
        checkpoint_dir=checkpoint_dir,
        windows=windows,
        sequence_parallel=settings.sequence_parallel,
        store=store,
        loraplus_ratio=settings.loraplus_ratio,
        model=model,
        args=arguments,
    )
    if settings.full_attention_share:
        trainer.add_callback(FullAttentionAtTheEnd(settings.full_attention_share, full_attention))
    if isinstance(windows, PoseWindows):
        trainer.add_callback(OtherSkipsEachEpoch(windows))
    return trainer


def report_progress(trainer: ResumableTrainer, tensorboard_dir: str, progress: ProgressSettings) -> LogProgress:
    """Let a trainer log lines, and write TensorBoard events in its first process, instead of printing."""
    log_progress = LogProgress(progress.logging_steps)
    trainer.add_callback(log_progress)
    if trainer.is_world_process_zero():
        trainer.add_callback(ResumableTensorBoard(SummaryWriter(tensorboard_dir)))
    trainer.remove_callback(PrinterCallback)
    return log_progress


def save_trained(trainer: ResumableTrainer, config, output: str) -> None:
    """Write the adapter, or all weights in the precision that the base is stored in, and the trainer's state.

    Args:
        trainer: after the training.
        config: of the base model.
        output: folder to write to.
    """
    model: Any = trainer.model
    if not isinstance(model, PeftModel):
        model.to(stored_dtype(config))
        model.generation_config = GenerationConfig()  # the published model gets the base's
        model.config.use_cache = config.use_cache  # the trainer switches it off
    trainer.save_model(output)  # gathers weights that ZeRO has sharded
    if trainer.is_world_process_zero():
        (Path(output) / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
        trainer.state.save_to_json(str(Path(output) / "trainer_state.json"))
