"""What a training reports while it runs: lines of the job's log, and TensorBoard event files."""

import logging
import time

from transformers import TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback

log = logging.getLogger(__name__)

TRACED = ("step", "loss", "learning_rate", "grad_norm")
"""What the training card has of every step."""


class LogProgress(TrainerCallback):
    """Logs a line every ``every`` optimizer steps: step, loss, learning rate, tokens per second."""

    def __init__(self, every: int):
        self.every = every

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.tokens = time.perf_counter(), state.num_input_tokens_seen

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs and (state.global_step % self.every == 0 or state.global_step == state.max_steps):
            rate = (state.num_input_tokens_seen - self.tokens) / (time.perf_counter() - self.started)
            line = "step %d of %d: loss %.4f, learning rate %.2e, %.0f tokens/s"
            log.info(line, state.global_step, state.max_steps, float(logs["loss"]), float(logs["learning_rate"]), rate)

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
    """Writes TensorBoard events; a resumed training also writes those of the steps before the interruption."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        for row in state.log_history:
            for name in TRACED[1:]:
                if name in row:
                    self.tb_writer.add_scalar(f"train/{name}", row[name], row["step"])


def trace_of(state: TrainerState) -> list[dict[str, float | None]]:
    """Loss, learning rate and gradient norm of every step."""
    return [{key: row.get(key) for key in TRACED} for row in state.log_history if "loss" in row]
