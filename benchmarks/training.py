"""Speed and peak memory of a training step, against transformers' plain path and the published LongQLoRA step.

    python benchmarks/training.py                               # on a CPU; no network, no GPU
    PYTHONPATH=. python benchmarks/training.py --device cuda    # LLaMA2-7B and 13B shapes; nothing needs installing

The cases, all with a LoRA adapter of rank 64 on every linear layer, activation checkpointing and a batch of one window:

* ours: causal S² attention by the fused kernel, chunked loss, non-reentrant checkpointing (``longqlora``);
* ours_full: the same with full attention;
* ours_linear_outputs, ours_all: ours in other forms of ``longqlora.training.activations``: the outputs of the base's linear
  layers are kept; everything is kept;
* plain: transformers' SDPA attention, and its loss over all logits of the window;
* published: S² attention as first published (scores materialised, the sequence rolled), logits of the window in float32,
  reentrant checkpointing; written anew from its description;
* perplexity: no training, but the evaluation of a window (``longqlora.evaluation.perplexity``), full attention, no adapter;
* forward: nothing but transformers' forward pass over it, all logits of the window in the type of the weights.

A step is forward, backward, clipping and AdamW; ours runs with our settings of the C library as well
(``longqlora.modeling.devices.keep_freed_memory``). Weights are random, the same in all cases, made and quantized layer by
layer; so are the tokens. Each case is a process of its own. On a CPU those of one length take their steps in turn; on a GPU,
where one alone may fill the memory, one case follows the other. Times are medians, one step before them not counted. Memory
is the peak of the process (VmHWM) or of torch's allocator on a GPU, which does not see a paged optimizer's state; "above the
weights" is without what there was when model and adapter were loaded."""

import argparse
import importlib.util
import json
import os
import shlex
import signal
import statistics
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

try:
    import torch
    from measuring import GIB, MIB, Child, measure_together
    from training_cases import ADAPTER, CASES, SHAPES, set_up_case, set_up_ceiling, step_flops

    from longqlora.jobs.machine import machine, versions
except ImportError as missing:
    raise SystemExit(
        f"{missing}. The benchmark needs torch, transformers (5 or newer) and peft, bitsandbytes for a 4-bit base, and this "
        "project: installed, or PYTHONPATH=. in its root"
    ) from missing

DEFAULTS = {  # of each device
    "cpu": {"shapes": ["small"], "lengths": [2048, 8192], "cases": ["ours", "ours_full", "plain", "published"]},
    "cuda": {
        "shapes": ["7b", "13b"],
        "lengths": [4096, 8192, 12288, 16384, 32768],
        "cases": ["ours", "ours_full", "plain", "published", "perplexity", "forward"],
    },
}


# The tables


def median_seconds(row: dict) -> float | None:
    return statistics.median(row["seconds"]) if row.get("seconds") else None


def memory_above(row: dict) -> int | None:
    """Peak above the weights, in bytes."""
    return row["peak_bytes"] - row["loaded_bytes"] if "peak_bytes" in row else None


def step_table(rows: list[dict], ceiling: dict) -> list[str]:
    """A line for each case: speed, memory, share of the machine's matrix product."""
    lines = [
        "| shape | tokens | step | tokens/s | s a step (min to max) | CPU s a step | peak above the weights, MiB | peak, GiB "
        "| TFLOP/s | of the matmul rate | first loss | |",
        "|:--|--:|:--|--:|--:|--:|--:|--:|--:|--:|--:|:--|",
    ]
    for row in rows:
        speed = memory = rate = [""] * 2
        cpu = ""
        if seconds := median_seconds(row):
            flops = step_flops(row["shape"], row["case"], row["tokens"]) / seconds
            spread = f"{seconds:.3g} ({min(row['seconds']):.3g} to {max(row['seconds']):.3g})"
            speed, cpu = [f"{row['tokens'] / seconds:.0f}", spread], f"{statistics.median(row['cpu_seconds']):.3g}"
            rate = [f"{flops / 1e12:.3g}", f"{flops / ceiling['matmul_flops']:.0%}" if "matmul_flops" in ceiling else ""]
        if "peak_bytes" in row:
            memory = [f"{memory_above(row) / MIB:.0f}", f"{row['peak_bytes'] / GIB:.2f}"]
        loss = f"{row['first_loss']:.4f}" if "first_loss" in row else ""
        cells = [row["shape"], row["tokens"], row["case"], *speed, cpu, *memory, *rate, loss, row.get("failure", "")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def find_row(rows: list[dict], shape: str, tokens: int, case: str) -> dict:
    """The row of a case, empty if it was not measured."""
    return next((row for row in rows if (row["shape"], row["tokens"], row["case"]) == (shape, tokens, case)), {})


def quotient(left: float | None, right: float | None) -> float | None:
    return left / right if left is not None and right else None


def ratio_table(rows: list[dict]) -> list[str]:
    """A line for each case beside ours: how many times faster ours is, and what share of the memory it takes."""
    lines = [
        "| shape | tokens | ours against | speed | peak above the weights | peak |",
        "|:--|--:|:--|--:|--:|--:|",
    ]
    for row in rows:
        ours = find_row(rows, row["shape"], row["tokens"], "ours")
        if row["case"] == "ours" or not CASES[row["case"]].is_training or not ours:
            continue
        speed = quotient(median_seconds(row), median_seconds(ours))
        above = quotient(memory_above(ours), memory_above(row))
        peak = quotient(ours.get("peak_bytes"), row.get("peak_bytes"))
        cells = [f"{ratio:.2f}" if ratio is not None else "" for ratio in (speed, above, peak)]
        if any(cells):
            lines.append(f"| {row['shape']} | {row['tokens']} | {row['case']} | {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []


def goals(rows: list[dict], ceiling: dict) -> list[tuple[str, float | None, float, bool]]:
    """What a training step is meant to reach: text, measured value, bound, whether the bound is a minimum."""

    def speed(shape, tokens, other, case="ours"):
        return quotient(*(median_seconds(find_row(rows, shape, tokens, name)) for name in (other, case)))

    def above(shape, tokens, case="ours"):
        return memory_above(find_row(rows, shape, tokens, case))

    def peak(shape, tokens):
        return quotient(find_row(rows, shape, tokens, "ours").get("peak_bytes"), GIB)

    def scored(measure):
        return quotient(*(measure(find_row(rows, "small", 8192, case)) for case in ("perplexity", "forward")))

    rate = quotient(step_flops("7b", "ours", 8192), median_seconds(find_row(rows, "7b", 8192, "ours")))
    found = {
        "small": [
            *((f"{n} tokens: speed of ours_linear_outputs against published",
               speed("small", n, "published", "ours_linear_outputs"), bound, True) for n, bound in ((2048, 1.2), (8192, 1.65))),
            *((f"{n} tokens: memory of ours_linear_outputs against published, above the weights",
               quotient(above("small", n, "ours_linear_outputs"), above("small", n, "published")), 0.6, False)
              for n in (2048, 8192)),
            ("2048 tokens: memory of ours against published, above the weights",
             quotient(above("small", 2048), above("small", 2048, "published")), 0.5, False),
            ("ours: memory at 8192 tokens against 2048, above the weights",
             quotient(above("small", 8192), above("small", 2048)), 4.4, False),
            ("8192 tokens: time of an evaluation against the forward pass", scored(median_seconds), 1.1, False),
            ("8192 tokens: its memory against that of the forward pass, above the weights", scored(memory_above), 1, False),
        ],
        "7b": [
            ("7B, 8192 tokens: peak of ours, GiB", peak("7b", 8192), 12, False),
            ("7B, 8192 tokens: ours, share of the matmul rate", quotient(rate, ceiling.get("matmul_flops")), 0.5, True),
            ("7B, 8192 tokens: speed of ours against published", speed("7b", 8192, "published"), 3, True),
            ("7B, 32768 tokens: speed of S² against full attention", speed("7b", 32768, "ours_full"), 1.5, True),
        ],
        "13b": [("13B, 12288 tokens: peak of ours, GiB", peak("13b", 12288), 24, False)],
    }  # fmt: skip
    shapes = {row["shape"] for row in rows}
    return [goal for shape, of_shape in found.items() if shape in shapes for goal in of_shape]


def goal_table(rows: list[dict], ceiling: dict) -> list[str]:
    lines = ["| goal | bound | measured | |", "|:--|--:|--:|:--|"]
    for text, value, bound, is_minimum in goals(rows, ceiling):
        met = None if value is None else value >= bound if is_minimum else value <= bound
        verdict = {None: "not measured", True: "met", False: "**not met**"}[met]
        measured = "" if value is None else f"{value:.2f}"
        lines.append(f"| {text} | {'≥' if is_minimum else '≤'} {bound:g} | {measured} | {verdict} |")
    return lines if len(lines) > 2 else []


def describe_run(results: dict) -> list[str]:
    """Command, machine and versions of the run, and what the machine can do."""
    where, ceiling = results["machine"], results["ceiling"]
    packages = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    base = "NF4" if results["precision"] == "nf4" else "16 bit (float32 on a CPU), bitsandbytes being absent"
    gpu = f"; {ceiling['device']}" if ceiling.get("device", "cpu") != "cpu" else ""
    lines = [
        f"## Training step, {results['date']}",
        "",
        f"`{results['command']}`, {where['cores']} cores of {where['processor']}, {where['system']}{gpu}; {packages}.",
        f"Base in {base}, LoRA of rank {ADAPTER.rank} on all linear layers, dropout {ADAPTER.dropout}; b = 1; median of "
        f"{results['repetitions']} steps.",
    ]
    if "matmul_flops" in ceiling:
        size, dtype = ceiling["matmul_size"], ceiling["matmul_dtype"]
        lines.append(
            f"The machine: {ceiling['matmul_flops'] / 1e12:.3g} TFLOP/s in a product of {size} × {size} matrices in {dtype}, "
            f"{ceiling['copy_bytes_per_second'] / 1e9:.3g} GB/s in a copy (read + write)."
        )
    lines += [f"Missing here: {', '.join(ceiling['stand_ins'])}."] if ceiling.get("stand_ins") else []
    lines += [f"The ceiling is not known: {ceiling['failure']}."] if "failure" in ceiling else []
    return lines


def report_markdown(results: dict) -> str:
    """All tables of a run, of an interrupted one as far as it came."""
    rows, ceiling = results["steps"], results["ceiling"]
    tables = [describe_run(results), step_table(rows, ceiling), ratio_table(rows), goal_table(rows, ceiling)]
    return "\n\n".join("\n".join(lines) for lines in tables if lines)


# The command


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=DEFAULTS, default="cpu")
    parser.add_argument("--shape", choices=SHAPES, nargs="+", dest="shapes", help="default: small; on a GPU 7b 13b")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of a window; default: 2048 8192; on a GPU 4096 … 32768")
    parser.add_argument("--cases", choices=CASES, nargs="+", help="default: all; on a CPU those that train")
    parser.add_argument("--repetitions", type=int, default=3, help="timed steps of each case, after one that is not (3)")
    parser.add_argument("--time-limit", type=float, default=240, help="seconds for a case, its loading included (240)")
    parser.add_argument("--output", type=Path, help="JSON file, rewritten after each step")
    arguments = parser.parse_args()
    for name, value in DEFAULTS[arguments.device].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU on this machine")
    if arguments.device == "cpu" and not Path("/proc/self/status").exists():
        parser.error("--device cpu: memory is read from /proc, which only Linux has")
    return arguments


def run(arguments: argparse.Namespace, results: dict, save: Callable[[], None]) -> None:
    """Measure the ceiling, then every length of every shape, into ``results``."""
    limits = {"repetitions": arguments.repetitions, "time_limit": arguments.time_limit, "save": save}
    child = Child(set_up_ceiling, arguments.device, time_limit=arguments.time_limit)
    try:
        results["ceiling"] = child.answer()
    finally:
        child.stop()

    def set_up_of(row):
        # a process has the environment of its parent, and torch reads this before the case is set up; huge pages are ours too
        os.environ["THP_MEM_ALLOC_ENABLE"] = str(int(CASES[row["case"]].is_ours))
        return set_up_case, row["case"], row["shape"], results["precision"], row["tokens"], arguments.device

    for shape in arguments.shapes:
        for length in arguments.lengths:
            rows = [{"shape": shape, "tokens": length, "case": case} for case in arguments.cases]
            for together in [rows] if arguments.device == "cpu" else [[row] for row in rows]:
                results["steps"] += together
                measure_together(together, set_up_of=set_up_of, **limits)


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what `timeout` sends ends a run like Ctrl-C
    arguments = parse_arguments()
    results = {
        "date": date.today().isoformat(),
        "command": shlex.join([os.path.basename(sys.executable), *sys.argv]),
        "machine": machine(),
        "versions": versions(),
        "precision": "nf4" if importlib.util.find_spec("bitsandbytes") else "auto",
        "repetitions": arguments.repetitions,
        "ceiling": {},
        "steps": [],
    }

    def save() -> None:
        if arguments.output:
            arguments.output.write_text(json.dumps(results, indent=1))

    interrupted = False
    try:
        run(arguments, results, save)
    except KeyboardInterrupt:
        interrupted = True
        for row in results["steps"]:
            if len(row.get("seconds", [])) < arguments.repetitions:
                row.setdefault("failure", "interrupted")
    save()
    print(report_markdown(results))
    if interrupted:
        sys.exit(130)


if __name__ == "__main__":
    main()
