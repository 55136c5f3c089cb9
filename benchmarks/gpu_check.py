"""Checks and measures longqlora on one GPU: each case in a process of its own, a line of JSON for each, a table at the end.

    python benchmarks/gpu_check.py                                     # on a GPU machine with the project's environment
    python benchmarks/gpu_check.py --cases probe 7b_8192 --deadline 200
    python benchmarks/gpu_check.py --device cpu --toy                  # does the check itself work? Minutes, no GPU

On a GPU machine that has torch, but neither this environment nor a network, ``gpu_check.sh`` brings the missing parts along.

The most important cases come first, and the check ends at its deadline, so a run that is cut off counts as far as it came. A
case that fails or takes too long leaves a line that says so. While a case works, the process of the next one imports what it
needs. The check uses GPU 0, unless CUDA_VISIBLE_DEVICES names another one, and expects to have it to itself.

Memory is that of torch's allocator, which does not see a paged optimizer's state. "Traced" is the peak that ``memory.py`` finds
without a GPU (``--trace``).
"""

import argparse
import functools
import gc
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import longqlora.jobs.log  # noqa: F401 (as in a job, it comes first: it sets how torch allocates memory)

import torch
from gpu_tables import report_markdown
from measuring import GIB, Child

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Case:
    """One check: for how many seconds it may work, which function does it, and with which arguments.

    ``function`` is ``module.name`` of a generator that yields parts of the case's line, so that what comes before a failure
    counts. ``traced`` is a form of ``memory.FORMS`` whose peak the case's is compared with.
    """

    seconds: float
    function: str
    arguments: dict = field(default_factory=dict)
    traced: str | None = None


def steps(seconds: float, case: str, shape: str, tokens: int, *, traced: str | None = None, **options) -> Case:
    """Steps of a case of ``training_cases.CASES``; options are further arguments of ``gpu_cases.take_steps``."""
    arguments = {"case": case, "shape": shape, "tokens": tokens, "repetitions": 2, "paged": True, **options}
    return Case(seconds, "gpu_cases.take_steps", arguments, traced)


SMALL = {"width": 512, "tokens": 1024, "rank": 256, "paged": True}  # paged are matrices of 100,000 numbers and more
CASES = {  # the most important first
    "probe": Case(60, "gpu_cases.probe"),
    "gpus": Case(30, "gpu_reservation.reserve_and_release"),
    "paged": Case(30, "gpu_cases.use_paged_memory"),
    "7b_8192": steps(75, "ours", "7b", 8192, repetitions=3, profile=True, traced="current"),
    "numerics": Case(45, "gpu_numerics.compare_with_float64"),
    "offloading": Case(75, "gpu_numerics.compare_offloading", {"shape": "7b", "tokens": 8192}),
    "end_to_end": Case(110, "gpu_trainings.end_to_end", SMALL),
    "13b_12288": steps(75, "ours", "13b", 12288, traced="current"),
    "variants": Case(90, "gpu_trainings.train_variants", SMALL),
    "7b_8192_trainer": Case(90, "gpu_trainings.train_7b", {"shape": "7b", "tokens": 8192, "paged": True}, "current"),
    "7b_32768": steps(80, "ours", "7b", 32768, repetitions=1, traced="current"),
    "7b_32768_full": steps(90, "ours_full", "7b", 32768, repetitions=1, traced="current"),
    "7b_8192_evaluation": steps(45, "perplexity", "7b", 8192),
    "7b_8192_forward": steps(45, "forward", "7b", 8192),
    "7b_8192_generation": Case(60, "gpu_cases.generate", {"shape": "7b", "tokens": 8192}),
    "7b_8192_published": steps(60, "published", "7b", 8192),
    "7b_8192_plain": steps(60, "plain", "7b", 8192),
    "7b_8192_float16": steps(60, "ours", "7b", 8192, dtype="float16", traced="current"),
    "7b_8192_offloaded": steps(60, "ours", "7b", 8192, form="offloaded", traced="offloaded"),
    "13b_12288_offloaded": steps(75, "ours", "13b", 12288, repetitions=1, form="offloaded", traced="offloaded"),
    "7b_8192_documents": steps(60, "ours", "7b", 8192, documents=10),
    "7b_8192_compiled": steps(120, "ours", "7b", 8192, compiled=True),
}
TOY = {"shape": "toy", "tokens": 512, "width": 64, "rank": 8, "repetitions": 1}
IMPORT_SECONDS, LEAST_SECONDS = 120, 15  # for a case's imports; what must be left of the deadline for a case to begin


# In a case's process


def set_up(function: str, arguments: dict) -> tuple[dict, Callable[[], dict]]:
    """Import a case's function; return a function that gives the next part of its line, at the end ``{"finished": True}``."""
    os.dup2(2, 1)  # what libraries print belongs into the log
    module, name = function.split(".")
    parts = getattr(import_module(module), name)(**arguments)
    gc.freeze()
    gc.enable()
    return {}, lambda: next(parts, {"finished": True})


# In the check's


def arguments_of(case: Case, device: str, *, toy: bool, paged: bool = True) -> dict:
    """The arguments of a case's function; at toy size, and without paged memory, if so asked."""
    replaced = (TOY if toy else {}) | ({} if paged else {"paged": False})
    return {"device": device, **case.arguments, **{key: replaced[key] for key in case.arguments if key in replaced}}


def run_case(child: Child, seconds: float, end: float) -> dict:
    """What a case's process finds in so many seconds after its imports; ``failure`` says why that is not all.

    Args:
        end: of the check, by ``time.monotonic``.
    """

    def limit(wanted: float) -> float:
        return max(0.0, min(wanted, end - time.monotonic()))

    try:
        child.time_limit = child.left = limit(IMPORT_SECONDS)
        found, case_limit = child.answer(), limit(seconds)
        while "failure" not in found and "finished" not in found:
            found |= child.take_step(case_limit)
            case_limit = None  # it has begun
    finally:
        child.stop()
    found.pop("finished", None)
    return found


def run_cases(cases: dict[str, Case], device: str, *, toy: bool, deadline: float, write: Callable[[dict], None]) -> None:
    """Run cases one after the other until the deadline, and write a line for each.

    Args:
        deadline: seconds from now.
        write: takes a line: case, took_s, what was found, perhaps failure.
    """
    end, paged, waiting = time.monotonic() + deadline, True, None

    def start(name: str) -> Child:
        arguments = arguments_of(cases[name], device, toy=toy, paged=paged)
        return Child(set_up, cases[name].function, arguments, time_limit=IMPORT_SECONDS)

    try:
        for name, following in zip(cases, [*list(cases)[1:], None], strict=True):
            if end - time.monotonic() < LEAST_SECONDS:
                write({"case": name, "failure": "no time left"})
                continue
            child = waiting or start(name)
            decides = name == "paged"  # how the cases behind it train
            waiting = start(following) if following and not decides else None
            started = time.monotonic()
            found = run_case(child, cases[name].seconds, end)
            paged = paged and not (decides and "failure" in found)
            write({"case": name, "took_s": round(time.monotonic() - started, 1), **found})
    finally:
        if waiting:
            waiting.stop()


def trace_cases() -> dict[str, dict]:
    """The traced peak of each case that has one, without a GPU: ``peak_gib``, and the ``compute_type`` that it holds for."""
    import memory
    from training_cases import CASES as STEPS

    from longqlora.planning.traced_jobs import trace_step

    @functools.cache
    def peak_gib(shape: str, tokens: int, form: str, dtype: str, attention: str) -> float:
        return trace_step(memory.step_of(shape, tokens, form, dtype, attention)).largest.total / GIB

    traced = {}
    for name, case in CASES.items():
        if case.traced:
            given = case.arguments
            dtype, attention = given.get("dtype", "bfloat16"), STEPS[given.get("case", "ours")].attention
            attention = "full" if attention == "sdpa" else attention
            peak = peak_gib(given["shape"], given["tokens"], case.traced, dtype, attention)
            traced[name] = {"peak_gib": peak, "compute_type": dtype}
            print(f"{name}: {peak:.2f} GiB", file=sys.stderr)
    return traced


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--toy", action="store_true", help="tiny models, which a CPU can do as well")
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", help=f"default: all; {', '.join(CASES)}")
    parser.add_argument("--deadline", type=float, default=540, help="seconds for all cases together (540)")
    parser.add_argument("--output", type=Path, default=ROOT / "results/gpu_check.jsonl", help="results/gpu_check.jsonl")
    parser.add_argument("--traced", type=Path, default=ROOT / ".gpu/traced.json", help="traced peaks (.gpu/traced.json)")
    parser.add_argument("--trace", action="store_true", help="write the traced peaks and end; minutes, no GPU")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not arguments.trace and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU on this machine")
    return arguments


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what `timeout` sends ends a run like Ctrl-C
    gc.enable()
    arguments = parse_arguments()
    if arguments.trace:
        arguments.traced.parent.mkdir(parents=True, exist_ok=True)
        arguments.traced.write_text(json.dumps(trace_cases(), indent=1))
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # the trainer takes all that it sees
    traced = json.loads(arguments.traced.read_text()) if arguments.traced.exists() and not arguments.toy else {}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text("")
    begun, rows = time.monotonic(), []

    def write(row: dict) -> None:
        rows.append(row)
        with open(arguments.output, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{time.monotonic() - begun:4.0f} s  {row['case']}: {row.get('failure', 'done')}", flush=True)

    cases = {name: case for name, case in CASES.items() if name in (arguments.cases or CASES)}
    interrupted = False
    try:
        run_cases(cases, arguments.device, toy=arguments.toy, deadline=arguments.deadline, write=write)
    except KeyboardInterrupt:
        interrupted = True
    print(f"\n{report_markdown(rows, traced, shlex.join([os.path.basename(sys.executable), *sys.argv]))}")
    if interrupted:
        sys.exit(130)


if __name__ == "__main__":
    main()
