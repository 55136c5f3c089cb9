"""A trainer that resumes from checkpoints, writes one when it is interrupted, and stops at a loss that is not finite.

On the same machine, an interrupted run that is resumed ends in the same weights as an uninterrupted one, bit for bit: a
checkpoint (:mod:`longqlora.jobs.checkpointing`) holds the state of the optimizer and of the random generators, and the position
in the data.
"""

import logging
import shutil
import signal
from functools import partial
from pathlib import Path
from types import FrameType, MethodType
from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from longqlora.data.packing import TrainingData, pad_at_right, part_of_windows
from longqlora.data.pose import PoseWindows
from longqlora.jobs.checkpoint_store import CheckpointStore
from longqlora.jobs.checkpointing import (
    WRITING,
    checkpoints,
    newest_complete_checkpoint,
    publish_checkpoint,
    step_of_checkpoint,
)
from longqlora.training.heap import return_freed_memory

log = logging.getLogger(__name__)

KEPT_CHECKPOINTS = 2  # if the newest one is damaged, the training resumes from the one before


class NonFiniteLoss(ValueError):
    """A loss or gradient norm that is infinite or not a number."""


class Interrupted(RuntimeError):
    """A signal ended the training before its last step."""


class IndexedWindows(Dataset):
    """Windows with their index, so that an error message can say what a batch holds."""

    def __init__(self, windows: TrainingData):
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {**self.windows[index], "index": torch.tensor(index)}


def collate(rows: list[dict[str, torch.Tensor]], part: int = 0, parts: int = 1) -> dict[str, torch.Tensor]:
    """A batch of padded windows (:func:`longqlora.data.packing.pad_at_right`) with their indices as ``index``, ``[b]``; or one
    part of their tokens, see :func:`longqlora.data.packing.part_of_windows`."""
    batch = pad_at_right(rows)
    return (batch if parts == 1 else part_of_windows(batch, part, parts)) | {
        "index": torch.stack([row["index"] for row in rows])
    }


class NothingLeftToTrain(Exception):
    """The checkpoint is of the last step. Without this, transformers' trainer would take one more step before it stops."""


class StopOnSignal(TrainerCallback):
    """On SIGTERM or SIGINT, ends the training after the current step, with a checkpoint; a second signal ends it at once. Also
    ends a training that resumes from its last step."""

    received: signal.Signals | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.former = {number: signal.signal(number, self.handle) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        log.warning("%s: the training ends after this step, with a checkpoint", self.received.name)
        self.restore_handlers()

    def restore_handlers(self) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            raise NothingLeftToTrain

    def on_step_end(self, args, state, control, **kwargs):
        if any_rank(self.received is not None):
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self.restore_handlers()


def any_rank(flag: bool) -> bool:
    """Whether the flag is set in at least one of the processes that train together."""
    if not torch.distributed.is_initialized():
        return flag
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    flags = torch.tensor(float(flag), device=device)
    torch.distributed.all_reduce(flags)
    return bool(flags)


def load_paged_state(optimizer, state_dict: dict) -> None:
    """Load the state of a paged optimizer of bitsandbytes into paged memory, where it was before it was saved.

    The library's own method loads it into GPU memory (8 bytes for each trained weight), so that a run which has used up the
    GPU's memory could not resume.
    """
    type(optimizer).load_state_dict(optimizer, state_dict, move_to_device=False)
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if name in ("state1", "state2"):
                state[name] = optimizer.get_state_buffer(weight, dtype=value.dtype).copy_(value)
            elif isinstance(value, torch.Tensor):
                state[name] = value.to(weight.device)


def paged_state_bytes(optimizer) -> int:
    """Bytes of an optimizer's state in paged memory, which torch's allocator does not count."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in values if getattr(value, "is_paged", False))


class FullAttentionAtTheEnd(TrainerCallback):
    """Gives a model full attention for the last optimizer steps.

    Args:
        share: of the steps.
        attention: the full attention, by its name in transformers.
    """

    def __init__(self, share: float, attention: str):
        self.share, self.attention = share, attention

    def on_step_begin(self, args, state, control, model: Any = None, **kwargs):
        if (
            state.global_step >= state.max_steps - round(self.share * state.max_steps)
            and model.config._attn_implementation != self.attention
        ):
            log.info("full attention from step %d on", state.global_step + 1)
            model.set_attn_implementation(self.attention)


class OtherSkipsEachEpoch(TrainerCallback):
    """Tells the windows of PoSE which epoch begins, or goes on after an interruption."""

    def __init__(self, windows: PoseWindows):
        self.windows = windows

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.windows.set_epoch(int(state.epoch))


class ResumableTrainer(Trainer):
    """A trainer with atomic, verified checkpoints, which stops at a loss that is not finite.

    Args:
        checkpoint_dir: folder of the checkpoints.
        windows: the training data.
        sequence_parallel: how many processes share each window.
        store: where the checkpoints are copied to, in the first process of a training that has one.
        loraplus_ratio: learning rate of an adapter's matrices B as a multiple of that of A (LoRA+, Hayou et al. 2024,
            arXiv 2402.12354); None: both have the same.
        kwargs: to ``Trainer``.
    """

    def __init__(
        self,
        *,
        checkpoint_dir: Path,
        windows: TrainingData,
        sequence_parallel: int = 1,
        store: CheckpointStore | None = None,
        loraplus_ratio: float | None = None,
        args: TrainingArguments,
        **kwargs,
    ):
        part = args.process_index % sequence_parallel
        collate_part = partial(collate, part=part, parts=sequence_parallel)
        super().__init__(train_dataset=IndexedWindows(windows), data_collator=collate_part, args=args, **kwargs)
        self.checkpoint_dir, self.windows, self.store, self.stop = checkpoint_dir, windows, store, StopOnSignal()
        self.loraplus_ratio, self.sequence_parallel = loraplus_ratio, sequence_parallel
        self.add_callback(self.stop)

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        if self.sequence_parallel > 1:  # the same windows for all processes that share them
            batches: Any = loader.batch_sampler
            batches.num_processes //= self.sequence_parallel
            batches.process_index //= self.sequence_parallel
        return loader

    def create_optimizer(self, *args, **kwargs):
        if self.loraplus_ratio:
            self.optimizer = self.loraplus_optimizer(self.loraplus_ratio)
        optimizer: Any = super().create_optimizer(*args, **kwargs)
        if getattr(optimizer, "is_paged", False):
            optimizer.load_state_dict = MethodType(load_paged_state, optimizer)
        return optimizer

    def loraplus_optimizer(self, ratio: float) -> torch.optim.Optimizer:
        """The configured optimizer with the learning rates of LoRA+: see the class."""
        model: Any = self.model
        optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
        optimizer = create_loraplus_optimizer(
            model, optimizer_class, loraplus_lr_ratio=ratio, loraplus_weight_decay=self.args.weight_decay, **settings
        )
        optimizer.param_groups[:] = [
            group for group in optimizer.param_groups if group["params"]
        ]  # DeepSpeed takes no empty one
        return optimizer

    def resume(self) -> int:
        """Train to the last step, from the newest complete checkpoint if there is one, local or in the store.

        Returns:
            The step of that checkpoint, or 0.

        Raises:
            NonFiniteLoss: if a loss or a gradient norm is not finite; the last good checkpoint is kept.
            Interrupted: if a signal ended the training; there is a checkpoint of its last step.
            OSError: if a checkpoint cannot be written, where the ones before it are kept, or the store cannot be read.
        """
        with self.args.main_process_first(local=False):  # nodes share the folder
            checkpoint = newest_complete_checkpoint(self.checkpoint_dir)
            if self.store:
                checkpoint = self.store.fetch_newer(checkpoint)
        if checkpoint:
            log.info("resuming from %s", checkpoint)
        try:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except NothingLeftToTrain:  # interrupted after the last step, for example while the adapter was written
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        if self.state.global_step < self.state.max_steps:
            by = self.stop.received.name if self.stop.received else "a signal"
            raise Interrupted(
                f"ended by {by} after step {self.state.global_step} of {self.state.max_steps}; a rerun resumes from there"
            )
        return step_of_checkpoint(checkpoint.name) if checkpoint else 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        indices = inputs["index"]
        inputs = {name: value for name, value in inputs.items() if name != "index"}
        return_freed_memory(self.args.device)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return_freed_memory(self.args.device)
        loss = result[0] if isinstance(result, tuple) else result
        if not torch.isfinite(loss):
            raise self.non_finite(
                f"the loss is {loss.item()} in a batch of {'; '.join(map(self.windows.contents, indices.tolist()))}"
            )
        return result

    def non_finite(self, problem: str) -> NonFiniteLoss:
        """The error that a loss or a gradient norm is not finite."""
        return NonFiniteLoss(
            f"step {self.state.global_step + 1}: {problem}. Look at these texts; a lower training.learning_rate, a longer "
            "training.warmup_steps or a smaller training.max_grad_norm may help"
        )

    def _get_output_dir(self, trial) -> str:
        return str(self.checkpoint_dir / WRITING)

    def _save_checkpoint(self, model, trial):
        name = f"checkpoint-{self.state.global_step}"
        norm = self.state.log_history[-1].get("grad_norm", 0.0) if self.state.log_history else 0.0
        if self.accelerator.scaler is None and not torch.isfinite(torch.tensor(float(norm))):
            raise self.non_finite(f"the norm of the gradients is {norm}")  # a loss scaler would have skipped the step
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                publish_checkpoint(self.checkpoint_dir, name)
        except Exception as error:
            shutil.rmtree(self.checkpoint_dir / WRITING, ignore_errors=True)
            raise OSError(
                f"{self.checkpoint_dir / name}: the checkpoint could not be written ({error}); the ones before it are "
                "complete, and a rerun resumes from the newest"
            ) from error
        if self.is_world_process_zero():
            for old in checkpoints(self.checkpoint_dir)[KEPT_CHECKPOINTS:]:
                shutil.rmtree(old)
        if self.store:
            self.store.update()
        self.accelerator.wait_for_everyone()
