"""What the rules of the workflow ask of a cluster for a job, from the plan of the experiment.

Standard library only: Snakemake asks when it is started, without torch.
"""

import json
import math
from functools import lru_cache
from pathlib import Path

MARGIN = 1.25  # of memory: a plan leaves out what other libraries hold
SLOWER = 2  # a job may take so many times as long as planned, because of other jobs and slow disks
MINUTES_TO_START = 10
MORE_PER_RETRY = 0.5  # of the first attempt's resources
MB = 10**6


def job_resources(
    plan: Path, stage: str, system: str, length: int | None, attempt: int, minutes: int | None = None
) -> dict[str, int]:
    """Resources of a job that runs a model, as Snakemake names them: ``mem`` (MB of main memory), ``gpu_mem_mb`` (of each GPU),
    and ``runtime`` (minutes); without those that the plan does not know, and no memory without a plan.

    Args:
        plan: JSON file of the plan.
        stage, system: of the job. If the plan has no such stage of the system, the memory is that of its largest job.
        length: tokens of its window or prompt; None, or one that is not planned, takes the last job of this stage and system,
            which is the largest.
        attempt: 1 for the first one; later attempts get more.
        minutes: time of the first attempt, in place of the plan's.
    """
    jobs = [job for job in (read_jobs(plan, plan.stat().st_mtime_ns) if plan.is_file() else []) if job["system"] == system]
    same = [job for job in jobs if job["stage"] == stage]
    others = sorted(({**job, "seconds": None} for job in jobs), key=lambda job: job["host"] or 0)
    exact = [job for job in same if job["length"] == length]
    job = (exact or same or others or [dict.fromkeys(("host", "peak", "on_gpu", "seconds"))])[-1]
    values = {
        "mem": job["host"] and job["host"] * MARGIN / MB,
        "gpu_mem_mb": job["on_gpu"] and job["peak"] and job["peak"] * MARGIN / MB,
        "runtime": minutes or (job["seconds"] and job["seconds"] * SLOWER / 60 + MINUTES_TO_START),
    }
    return {name: at_attempt(value, attempt) for name, value in values.items() if value}


def at_attempt(value: float, attempt: int) -> int:
    """What an attempt of a job gets of a resource, if the first one gets ``value``."""
    return math.ceil(value * (1 + MORE_PER_RETRY * (attempt - 1)))


@lru_cache(maxsize=8)
def read_jobs(plan: Path, modified: int) -> list[dict]:
    """The jobs of a plan, read again when the file has changed; none of a file that is damaged or of another version."""
    try:
        content = json.loads(plan.read_text(encoding="utf-8"))
        on_gpu = content["device"]["kind"] == "cuda"
        return [
            {"stage": job["stage"], "system": job["system"], "length": job.get("length"), "on_gpu": on_gpu}
            | {name: number(job.get(name)) for name in ("host", "peak", "seconds")}
            for job in content["jobs"]
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def number(value: float | None) -> float | None:
    """A number of a plan that is above zero, or None.

    Raises:
        TypeError: if it is no number.
    """
    return value if value is not None and 0 < value < math.inf else None
