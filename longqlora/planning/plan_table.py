"""A plan as text for a terminal."""

from collections.abc import Iterable, Sequence
from textwrap import fill

from tabulate import tabulate

from longqlora.jobs.progress import duration

WIDTH = 100
NAMES_WIDTH = 28


FORMS = {
    "all": "keeps all activations",
    "linear_outputs": "keeps outputs of linear layers",
    "layer_inputs": "keeps the inputs of layers",
    "offloaded": "keeps the inputs of layers in CPU memory",
}
"""What a training keeps for its backward pass (longqlora.training.activations)."""


def format_plan(plan: dict) -> str:
    """A plan in paragraphs: what each job needs, the parts of trainings, what does not fit, totals.

    Args:
        plan: as :meth:`longqlora.planning.plan.Planner.plan` makes it.
    """
    device = plan["device"]
    memory = f", {gib(device['memory'])}" if device["memory"] else ""
    title = f"{plan['experiment']} on {device['name']}{memory}, computing in {device['compute']}"
    parts = [title, jobs_table(plan), parts_of_trainings(plan["jobs"]), *notes(plan)]
    return "\n\n".join(part for part in parts if part)


def jobs_table(plan: dict) -> str:
    """A line for each kind of job and system, at its longest length; systems that need the same share a line."""
    longest: dict[tuple[str, str], dict] = {}
    for job in plan["jobs"]:
        cell = longest.setdefault((job["stage"], job["system"]), job)
        if cell["length"] <= job["length"]:
            longest[job["stage"], job["system"]] = job
    planned = [job for job in longest.values() if job["problem"] is None]
    on_gpu = plan["device"]["kind"] == "cuda"
    head = ["job", "system", "tokens", *(["GPU memory", "main memory"] if on_gpu else ["memory"]), "time", "fits"]
    rows = []
    for job, name in grouped(planned):
        sizes = [job["peak"], job["host"]] if on_gpu else [job["peak"]]
        rows.append([job["stage"], name, f"{job['length']:,}", *map(gib, sizes), time(job), fits(job)])
    return aligned([head, *rows], left=2)


def parts_of_trainings(jobs: Sequence[dict]) -> str:
    """The parts of the peak of each training, the largest first."""
    trainings = [job for job in jobs if job["stage"] == "training" and job["parts"]]
    lines = []
    for job, name in grouped(trainings):
        parts = sorted(job["parts"].items(), key=lambda part: -part[1])
        shown = [f"{part} {gib(size)}" for part, size in parts if size >= job["peak"] / 200]
        lines.append(paragraph(f"{name}: {' + '.join(shown)} ({FORMS[job['form']]}, peak at {job['at_peak']})"))
    return "\n".join(["Peak of the trainings, by part:", "", *lines]) if lines else ""


def notes(plan: dict) -> Iterable[str]:
    """Yield paragraphs on what does not fit or could not be planned, and the totals."""
    jobs = plan["jobs"]
    for job, name in grouped(misfits(jobs)):
        yield paragraph(f"{job['stage']} of {name} at {job['length']} tokens does not fit. {remedy(job)}")
    for problem, named in grouped_by_problem(jobs).items():
        yield paragraph(f"Not planned: {', '.join(named)}. {problem}")
    known = [job["seconds"] for job in jobs if job["seconds"] is not None]
    if known:
        missing = len([job for job in jobs if job["seconds"] is None])
        rest = f" ({missing} more jobs: unknown, such as cells whose evaluation sets are not prepared yet)" if missing else ""
        yield paragraph(f"Time of these jobs, one after the other: {duration(sum(known))}{rest}; preparing data comes on top.")
    if plan["disk"]["after"]:
        after, during, data = (size_on_disk(plan["disk"][name]) for name in ("after", "during", "data"))
        yield paragraph(
            f"Disk: {after} of models and adapters after the run, up to {during} during it; texts and tokens at most {data}."
        )


def misfits(jobs: Iterable[dict]) -> Iterable[dict]:
    """Yield the jobs that do not fit; of cells that the same settings help the longest alone, with the lengths of all."""
    same: dict[tuple, list[dict]] = {}
    for job in jobs:
        if job["fits"] is False:
            settings = str(job["change"] and job["change"]["settings"])
            same.setdefault((job["stage"], job["system"], settings), []).append(job)
    for group in same.values():
        yield group[-1] | {"length": ", ".join(f"{job['length']:,}" for job in group)}


def format_contexts(contexts: dict[str, int | None]) -> str:
    """The longest contexts as a paragraph; empty if none is known.

    Args:
        contexts: tokens by trained system; 0: none fits.
    """
    lengths = sorted({length for length in contexts.values() if length is not None})
    names = [", ".join(name for name, longest in contexts.items() if longest == length) for length in lengths]
    found = [f"{length:,} ({name})" if length else f"none ({name})" for length, name in zip(lengths, names, strict=True)]
    told = f"The longest context in tokens that a training fits with, in steps of 1024: {'; '.join(found)}."
    return paragraph(told) if found else ""


def remedy(job: dict) -> str:
    """What helps a job that does not fit."""
    if job["stage"] == "merging":
        return "What helps: a device with more memory."
    if job["change"] is None:
        return "No change of its settings that was tried makes it fit, not even the shortest context."
    settings = ", ".join(f"{key}: {value}" for key, value in job["change"]["settings"].items())
    return f"The cheapest change with which it does: {settings} (from {gib(job['change']['peak'])} on)."


def grouped(jobs: Iterable[dict]) -> Iterable[tuple[dict, str]]:
    """Yield jobs without those that differ from another one only in the system, each with the names of its systems."""
    same: dict[str, list[dict]] = {}
    for job in jobs:
        same.setdefault(str({key: value for key, value in job.items() if key != "system"}), []).append(job)
    for group in same.values():
        yield group[0], shortened([job["system"] for job in group])


def grouped_by_problem(jobs: Iterable[dict]) -> dict[str, list[str]]:
    """The names of the systems that could not be planned, by the reason."""
    found: dict[str, list[str]] = {}
    for job in jobs:
        if job["problem"] is not None and job["system"] not in found.setdefault(job["problem"], []):
            found[job["problem"]].append(job["system"])
    return found


def shortened(names: Sequence[str]) -> str:
    """Names in a column: as many as it has room for, and how many more there are."""
    for shown in range(len(names), 0, -1):
        more = f" + {len(names) - shown}" if shown < len(names) else ""
        text = ", ".join(names[:shown]) + more
        if len(text) <= NAMES_WIDTH or shown == 1:
            return text
    return ""


def aligned(rows: Sequence[Sequence[str]], *, left: int) -> str:
    """Rows in columns, the first one with their names; the first columns are aligned at the left, the others at the right."""
    sides = ["left" if number < left else "right" for number in range(len(rows[0]))]
    return tabulate(rows[1:], headers=rows[0], tablefmt="simple", colalign=sides, disable_numparse=True)


def paragraph(text: str) -> str:
    """A text in lines of a terminal's width."""
    return fill(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def gib(size: int | None) -> str:
    """A number of bytes in GiB, or in MiB if it is small."""
    if size is None:
        return "–"
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def size_on_disk(size: int) -> str:
    """A number of bytes in GB or MB, as disks are sold."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def time(job: dict) -> str:
    """The time of a job."""
    return "–" if job["seconds"] is None else duration(job["seconds"])


def fits(job: dict) -> str:
    """Whether a job fits."""
    return {None: "–", True: "yes", False: "NO"}[job["fits"]]
