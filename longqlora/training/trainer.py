"""The trainer: it resumes from checkpoints, ends with one when it is interrupted, and stops where a loss is not a number.

On the same machine a run that was interrupted ends in the same weights, bit for bit, as one that was not: a checkpoint
(:mod:`longqlora.jobs.checkpointing`) holds the optimizer's state, the random generators' and the place in the data.
"""

import logging
import shutil
import signal
from pathlib import Path
from types import MethodType

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback

from longqlora.data.packing import pad_at_right
from longqlora.jobs.checkpointing import WRITING, checkpoints, newest_complete_checkpoint, publish_checkpoint

log = logging.getLogger(__name__)


class NonFiniteLoss(ValueError):
    """A loss or a gradient that is not a number."""


class Interrupted(RuntimeError):
    """A training that a signal ended before its last step."""


class Numbered(Dataset):
    """Windows with their numbers, so that an error can name what a batch holds."""

    def __init__(self, windows):
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {**self.windows[index], "window": torch.tensor(index)}


def pad_numbered(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """:func:`longqlora.data.packing.pad_at_right`, and the rows' numbers as ``window``, ``[b]``."""
    return pad_at_right(rows) | {"window": torch.stack([row["window"] for row in rows])}


class AlreadyTrained(Exception):
    """A run that goes on from its last step: the trainer would take one more before it looks whether it is at the end."""


class StopOnSignal(TrainerCallback):
    """Ends the training at the end of the step in which SIGTERM or SIGINT arrives, with a checkpoint; a second one ends it at
    once. Begins none that is over."""

    received: signal.Signals | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.former = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(self, number, frame):
        self.received = signal.Signals(number)
        log.warning("%s: the training ends after this step, with a checkpoint", self.received.name)
        self.restore()

    def restore(self):
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            raise AlreadyTrained

    def on_step_end(self, args, state, control, **kwargs):
        if any_process(self.received is not None):
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self.restore()


def any_process(flag: bool) -> bool:
    """Whether a flag is set in any of the processes that train together."""
    if not torch.distributed.is_initialized():
        return flag
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    flags = torch.tensor(float(flag), device=device)
    torch.distributed.all_reduce(flags)
    return bool(flags)


def load_paged_state(optimizer, state_dict: dict) -> None:
    """Load the state of a paged optimizer of bitsandbytes into paged memory, as it was before it was saved.

    The library's own loading puts it into the GPU's memory (8 bytes for each trained weight), just when a run resumes that had
    exhausted it.
    """
    type(optimizer).load_state_dict(optimizer, state_dict, move_to_device=False)
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if name in ("state1", "state2"):
                state[name] = optimizer.get_state_buffer(weight, dtype=value.dtype).copy_(value)
            elif isinstance(value, torch.Tensor):
                state[name] = value.to(weight.device)


def paged_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state that are in paged memory, which torch's allocator does not count."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in values if getattr(value, "is_paged", False))


class ResumableTrainer(Trainer):
    """A trainer whose checkpoints are complete or ignored, and which stops where a loss is not a number.

    Args:
        checkpoint_dir: folder of the checkpoints.
        kept: how many of the last checkpoints are kept.
        windows: the training data.
        kwargs: to ``Trainer``.
    """

    def __init__(self, *, checkpoint_dir: Path, kept: int, windows, **kwargs):
        super().__init__(train_dataset=Numbered(windows), data_collator=pad_numbered, **kwargs)
        self.checkpoint_dir, self.kept, self.windows, self.stop = checkpoint_dir, kept, windows, StopOnSignal()
        self.add_callback(self.stop)

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        if getattr(optimizer, "is_paged", False):
            optimizer.load_state_dict = MethodType(load_paged_state, optimizer)
        return optimizer

    def resume(self) -> int:
        """Train to the end, from the newest complete checkpoint if there is one; return the step that it began from.

        Raises:
            NonFiniteLoss: if a loss or a gradient is not a number; the last good checkpoint stays.
            Interrupted: if a signal ended it; a checkpoint of the last step is there.
        """
        with self.args.main_process_first():
            checkpoint = newest_complete_checkpoint(self.checkpoint_dir)
        if checkpoint:
            log.info("resuming from %s", checkpoint)
        try:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except AlreadyTrained:  # what came before the end was interrupted, such as the writing of the adapter
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        if self.state.global_step < self.state.max_steps:
            by = self.stop.received.name if self.stop.received else "a signal"
            raise Interrupted(
                f"ended by {by} after step {self.state.global_step} of {self.state.max_steps}; a rerun resumes from there"
            )
        return int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        numbers = inputs["window"]
        inputs = {name: value for name, value in inputs.items() if name != "window"}
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        if not torch.isfinite(loss):
            self.refuse(f"the loss is {loss.item()} in a batch of {'; '.join(map(self.windows.contents, numbers.tolist()))}")
        return result

    def refuse(self, what: str) -> None:
        """Stop because something is not a number."""
        raise NonFiniteLoss(
            f"step {self.state.global_step + 1}: {what}. Look at these texts; a lower training.learning_rate, a longer "
            "training.warmup_steps or a smaller training.max_grad_norm may help"
        )

    def _get_output_dir(self, trial) -> str:
        return str(self.checkpoint_dir / WRITING)

    def _save_checkpoint(self, model, trial):
        name = f"checkpoint-{self.state.global_step}"
        norm = self.state.log_history[-1].get("grad_norm", 0.0) if self.state.log_history else 0.0
        if self.accelerator.scaler is None and not torch.isfinite(torch.tensor(float(norm))):
            self.refuse(f"the norm of the gradients is {norm}")  # with a scaler such a step is left out
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
            for old in checkpoints(self.checkpoint_dir)[self.kept :]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
