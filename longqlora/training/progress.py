"""What a training reports while it runs: lines of the job's log, and TensorBoard event files."""

import logging
import time
from contextlib import suppress

from transformers import TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback

from longqlora.jobs.progress import step_of

log = logging.getLogger(__name__)

TRACED = ("step", "loss", "learning_rate", "grad_norm")
"""What the training card has of every step."""
LONGEST_SILENCE = 15  # seconds


class LogProgress(TrainerCallback):
    """Logs a line every ``every`` optimizer steps, and at the first step that ends more than 15 seconds after the last line:
    step, time left, loss, learning rate, tokens per second."""

    def __init__(self, every: int):
        self.every = every

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = self.logged = time.perf_counter()
        self.steps, self.tokens = state.global_step, state.num_input_tokens_seen

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        step, now = state.global_step, time.perf_counter()
        if step % self.every == 0 or step == state.max_steps or now - self.logged > LONGEST_SILENCE:
            self.logged, seconds = now, now - self.started
            left = seconds / (step - self.steps) * (state.max_steps - step)
            rate = (state.num_input_tokens_seen - self.tokens) / seconds
            line = "%s: loss %.4f, learning rate %.2e, %.0f tokens/s"
            log.info(line, step_of(step, state.max_steps, left), float(logs["loss"]), float(logs["learning_rate"]), rate)

    def cost(self, state: TrainerState) -> dict[str, int | float]:
        """Steps and tokens of the whole run; seconds and speed since this process started or resumed it."""
        seconds, tokens = time.perf_counter() - self.started, int(state.num_input_tokens_seen)
        return {
            "steps": state.global_step,
            "tokens": tokens,
            "seconds": round(seconds, 1),
            "tokens_per_second": round((tokens - self.tokens) / seconds, 1),
        }


class ResumableTensorBoard(TensorBoardCallback):
    """Writes TensorBoard events; a resumed training also writes those of the steps before the interruption.

    The folder is an output of the job. When a cluster ends the job, Snakemake removes its outputs while the training still
    saves a checkpoint; this must not fail for lack of the folder.
    """

    def on_log(self, args, state, control, logs=None, **kwargs):
        try:
            super().on_log(args, state, control, logs, **kwargs)
        except OSError as error:
            log.warning("no further TensorBoard events are written: %s", error)
            self.tb_writer = None

    def on_train_end(self, args, state, control, **kwargs):
        with suppress(OSError):
            super().on_train_end(args, state, control, **kwargs)

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        for row in state.log_history:
            for name in TRACED[1:]:
                if name in row:
                    self.tb_writer.add_scalar(f"train/{name}", row[name], row["step"])


def trace_of(state: TrainerState) -> list[dict[str, float | None]]:
    """Loss, learning rate and gradient norm of every step."""
    return [{key: row.get(key) for key in TRACED} for row in state.log_history if "loss" in row]
