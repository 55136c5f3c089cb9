"""The plan of an experiment against what its jobs took."""

import csv
from pathlib import Path

from longqlora.reporting.report_sources import Sources

RULES = {  # folders in benchmarks/, by the stage of the plan
    "training": "train",
    "merging": "merge_adapter",
    "perplexity": "evaluate_perplexity",
    "retrieval": "evaluate_retrieval",
}
MIB = 2**20


def plan_check(sources: Sources) -> dict | None:
    """Planned and measured memory and time: a row for each training, and one for all jobs of each other stage. None if there is
    no plan, or no job of it has been measured."""
    plan = readable_plan(sources)
    if plan is None:
        return None
    on_gpu = plan["device"]["kind"] == "cuda"
    groups: dict[str, list[dict]] = {}
    for job in plan["jobs"]:
        pair = compared(sources, job, on_gpu)
        if pair:
            label = sources.experiment["systems"][job["system"]]["label"]
            groups.setdefault(f"training of {label}" if job["stage"] == "training" else job["stage"], []).append(pair)
    rows = [row_of(stage, pairs) for stage, pairs in groups.items()]
    return {"rows": rows, "device": plan["device"]["name"], "on_gpu": on_gpu} if rows else None


def readable_plan(sources: Sources) -> dict | None:
    """The plan, if there is one with jobs; a damaged one stops no report."""
    try:
        plan = sources.record("plan.json")
        return plan if plan and plan["jobs"] and plan["device"] else None
    except (ValueError, KeyError, TypeError):
        return None


def compared(sources: Sources, job: dict, on_gpu: bool) -> dict | None:
    """Memory (bytes) and time (seconds) of a job, each as planned and measured; None if it could not be planned or has not run.

    On a GPU, the memory of a training is that of the GPU, without CUDA's context; any other memory is main memory.
    """
    wildcards = [job["system"]] + ([str(job["length"])] if job["stage"] in ("perplexity", "retrieval") else [])
    path = sources.results / "benchmarks" / RULES[job["stage"]] / "/".join(wildcards)
    run = last_run(path.with_name(f"{path.name}.tsv"))
    known = job["system"] in sources.experiment["systems"] and sources.jobs.issuperset(wildcards)
    if run is None or not known or job["host"] is None:
        return None
    planned, measured = job["host"], memory_of(run)
    if on_gpu and job["stage"] == "training":
        card = sources.record(f"training/{job['system']}.json") or {}
        planned, measured = job["peak"], card.get("peak_reserved_bytes")
    return {"memory": (planned, measured), "seconds": (job["seconds"], float(run["s"]))}


def row_of(stage: str, pairs: list[dict]) -> dict:
    """The largest memory and the summed time of jobs, each as planned and measured; None where one of them is unknown."""
    memory = [pair["memory"] for pair in pairs if None not in pair["memory"]]
    seconds = [pair["seconds"] for pair in pairs if None not in pair["seconds"]]
    return {
        "stage": stage,
        "jobs": len(pairs),
        "memory": tuple(map(max, zip(*memory, strict=True))) if memory else None,
        "seconds": tuple(map(sum, zip(*seconds, strict=True))) if len(seconds) == len(pairs) else None,
    }


def last_run(path: Path) -> dict[str, str] | None:
    """What Snakemake measured of the last run of a job; None if there is no such file, or nothing in it."""
    if not path.is_file():
        return None
    with path.open(encoding="utf-8", newline="") as file:
        runs = list(csv.DictReader(file, delimiter="\t"))
    return runs[-1] if runs else None


def memory_of(run: dict[str, str]) -> int | None:
    """Peak memory of a measured job in bytes; Snakemake writes a dash for what it did not see."""
    return None if run["max_rss"] in ("-", "NA") else round(float(run["max_rss"]) * MIB)
