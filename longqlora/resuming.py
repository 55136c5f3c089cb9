"""A training that cannot be lost: checkpoints that are whole or not there, from the newest of which a rerun goes on.

A checkpoint is written under another name, sealed by a list of its files with their digests, and then renamed. A run that is
killed at any moment therefore leaves whole checkpoints and, at most, one that nobody takes for whole. On the same machine a run
that was interrupted ends in the same weights, bit for bit, as one that was not: a checkpoint holds the optimizer's state, the
random generators' and the place in the data.
"""

import json
import logging
import os
import shutil
import signal
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch.autograd.graph import save_on_cpu
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback

from longqlora.packing import pad_at_right
from longqlora.provenance import digest_of_file, digest_of_values

log = logging.getLogger(__name__)

SEAL = "files.json"


class NonFiniteLoss(ValueError):
    """A loss or a gradient that is not a number."""


class Interrupted(RuntimeError):
    """A training that a signal ended before its last step."""


def seal(folder: Path) -> None:
    """List the files of a checkpoint with their digests, all of it on the disk before the list is."""
    digests = {path.relative_to(folder).as_posix(): digest_of_file(path) for path in folder.rglob("*") if path.is_file()}
    for name in digests:
        flush_to_disk(folder / name)
    (folder / SEAL).write_text(json.dumps(digests))
    flush_to_disk(folder / SEAL)


def flush_to_disk(path: Path) -> None:
    """Wait until a file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_whole(folder: Path) -> bool:
    """Whether every file of a checkpoint is as it was when it was sealed."""
    try:
        digests = json.loads((folder / SEAL).read_text())
        return all(digest_of_file(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError):
        return False


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a work folder, the newest first."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rsplit("-", 1)[1]))


def newest_whole_checkpoint(folder: Path) -> Path | None:
    """The checkpoint to go on from; newer ones that are damaged are removed."""
    for checkpoint in checkpoints(folder):
        if is_whole(checkpoint):
            return checkpoint
        log.warning("%s is damaged and is not used", checkpoint)
        shutil.rmtree(checkpoint)
    return None


def open_work_folder(path: str, identity: dict) -> Path:
    """The folder for a run's checkpoints; those of a run with other settings, data or base are removed.

    Args:
        path: of the folder.
        identity: what the run's result depends on, as JSON.
    """
    folder, digest = Path(path), digest_of_values(identity)
    mark = folder / "run.txt"
    if folder.exists() and not (mark.exists() and mark.read_text() == digest):
        log.info("%s is of a run with other settings or data: the training begins anew", folder)
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(digest)
    return folder


class Numbered(Dataset):
    """Windows with their numbers, so that an error can name what a batch holds."""

    def __init__(self, windows):
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {**self.windows[index], "window": torch.tensor(index)}


def pad_numbered(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """:func:`longqlora.packing.pad_at_right`, and the rows' numbers as ``window``, ``[b]``."""
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


class ResumableTrainer(Trainer):
    """A trainer whose checkpoints are whole or not there, and which stops where a loss is not a number.

    Args:
        work: folder of the checkpoints.
        kept: how many of the last checkpoints are kept.
        offload_activations: whether what the backward pass needs waits in CPU memory.
        windows: the training data.
        kwargs: to ``Trainer``.
    """

    def __init__(self, *, work: Path, kept: int, offload_activations: bool, windows, **kwargs):
        super().__init__(train_dataset=Numbered(windows), data_collator=pad_numbered, **kwargs)
        self.work, self.kept, self.windows, self.stop = work, kept, windows, StopOnSignal()
        self.add_callback(self.stop)
        on_cpu = partial(save_on_cpu, pin_memory=self.args.device.type == "cuda")
        self.saved_activations = on_cpu if offload_activations else nullcontext

    def resume(self) -> int:
        """Train to the end, from the newest whole checkpoint if there is one; return the step that it began from.

        Raises:
            NonFiniteLoss: if a loss or a gradient is not a number; the last good checkpoint stays.
            Interrupted: if a signal ended it; a checkpoint of the last step is there.
        """
        with self.args.main_process_first():
            shutil.rmtree(self.work / "writing", ignore_errors=True)
            checkpoint = newest_whole_checkpoint(self.work)
        if checkpoint:
            log.info("going on from %s", checkpoint)
        try:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except AlreadyTrained:  # what came before the end was interrupted, such as the writing of the adapter
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        if self.state.global_step < self.state.max_steps:
            by = self.stop.received.name if self.stop.received else "a signal"
            raise Interrupted(
                f"ended by {by} after step {self.state.global_step} of {self.state.max_steps}; a rerun goes on from there"
            )
        return int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        numbers = inputs["window"]
        inputs = {name: value for name, value in inputs.items() if name != "window"}
        with self.saved_activations():
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
        return str(self.work / "writing")

    def _save_checkpoint(self, model, trial):
        name = f"checkpoint-{self.state.global_step}"
        norm = self.state.log_history[-1].get("grad_norm", 0.0) if self.state.log_history else 0.0
        if self.accelerator.scaler is None and not torch.isfinite(torch.tensor(float(norm))):
            self.refuse(f"the norm of the gradients is {norm}")  # with a scaler such a step is left out
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                seal(self.work / "writing" / name)
                (self.work / "writing" / name).rename(self.work / name)
        except Exception as error:
            shutil.rmtree(self.work / "writing", ignore_errors=True)
            raise OSError(
                f"{self.work / name}: the checkpoint could not be written ({error}); the ones before it are whole, and a rerun "
                "goes on from the newest"
            ) from error
        if self.is_world_process_zero():
            for old in checkpoints(self.work)[self.kept :]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
