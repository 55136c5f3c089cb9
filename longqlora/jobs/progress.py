"""How the progress of a job is written to its log, and found there again to be shown on the terminal.

This module uses the standard library only: Snakemake imports it at every start.
"""

import re

PROGRESS = re.compile(r"\b(step \d+ of \d+, [^:\n]+ left):")


def step_of(done: int, total: int, seconds: float) -> str:
    """The progress of a training, such as ``step 30 of 60, 18 s left``; after the last step, ``step 60 of 60``.

    Args:
        done: steps done, of which at least one in this process.
        total: all steps.
        seconds: expected time of the remaining steps.
    """
    return f"step {done} of {total}" + (f", {duration(seconds)} left" if done < total else "")


def newest_step(text: str) -> str | None:
    """The last progress in the text of a log, as :func:`step_of` writes it, if there is one."""
    found = PROGRESS.findall(text)
    return found[-1] if found else None


def duration(seconds: float) -> str:
    """A time in two units at most: ``18 s``, ``3 min 41 s``, ``5 h 2 min``."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    return f"{total // 3600} h {total % 3600 // 60} min"
