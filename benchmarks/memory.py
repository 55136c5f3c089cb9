"""Peak GPU memory of a QLoRA training step, traced without a GPU.

    python benchmarks/memory.py                                                      # minutes; no GPU, no network, no data
    python benchmarks/memory.py --steps 7b/8192 --compute-type float16               # as on a V100
    python benchmarks/memory.py --steps 7b/32768 --forms current --attention full
    python benchmarks/memory.py --contexts 7b/64 8b/64 8b/32

The step of all layers runs on fake tensors, by ``longqlora.planning.traced_jobs``, which has what is counted. A step is the
second micro-step of several (forward and backward), so gradients are there already.

With ``--contexts`` it prints the longest context that fits on cards of several sizes instead, by
``longqlora.planning.peak_memory``, which traces two layers and three, and adds an allowance for what no trace sees.
"""

import argparse
import os
import shlex
import sys
from datetime import date

import torch
from measuring import GIB
from training_cases import ADAPTER, SHAPES

from longqlora.config.settings import RopeExtension
from longqlora.jobs.machine import versions
from longqlora.modeling.devices import dtype_name
from longqlora.planning.peak_memory import Memory, longest_context, training_memory
from longqlora.planning.traced_jobs import Traced, TrainingStep, dtypes_of, trace_step
from longqlora.training.adapters import FLOAT32

STEPS = ("7b/8192", "13b/12288", "7b/32768", "8b/32768")
FORMS = {
    "float32": "embeddings, norms and output layer in float32, as peft prepares them",
    "current": "the dtypes of longqlora.training.adapters.base_dtypes",
    "offloaded": "the same, the layers' inputs in CPU memory until the backward pass",
}
PARTS = {
    "weights and adapter": ("weights", "quantization constants", "adapter"),
    "gradients": ("gradients",),
    "saved by the forward pass": ("layer inputs",),
    "backward pass": ("recomputation", "loss"),
}
COMPUTE_TYPES = ("bfloat16", "float16")
CARDS_GIB = (12, 16, 24, 40, 80)


def step_of(shape: str, tokens: int, form: str, compute_type: str, attention: str) -> TrainingStep:
    """A step on a GPU, to be traced.

    Args:
        shape: of ``training_cases.SHAPES``.
        form: of :data:`FORMS`.
        compute_type: of the GPU.
        attention: in training, as in the settings.
    """
    return TrainingStep(
        {"model_type": "llama", **SHAPES[shape]},
        RopeExtension(target_context=tokens),
        ADAPTER.model_copy(update={"attention": attention}),
        on_gpu=True,
        compute_dtype=getattr(torch, compute_type),
        form="offloaded" if form == "offloaded" else "layer_inputs",
        dtypes=FLOAT32 if form == "float32" else None,
    )


def table_row(name: str, form: str, step: TrainingStep, found: Traced) -> str:
    dtypes, peak = dtypes_of(step), found.largest
    base = f"{dtype_name(dtypes.weights)}, layers {dtype_name(dtypes.layers)}{', offloaded' if form == 'offloaded' else ''}"
    sizes = [peak.total, *(sum(peak.parts[part] for part in parts) for parts in PARTS.values()), 8 * found.trained]
    total, *others = (f"{size / GIB:.2f}" for size in sizes)
    return f"| {' | '.join([name, base, f'**{total}**', *others, peak.operation])} |"


def memory_at(shape: str, rank: int, tokens: int, attention: str) -> Memory:
    """Memory of a training on a GPU that keeps the layers' inputs on the host."""
    settings = ADAPTER.model_copy(update={"rank": rank, "attention": attention})
    model = {"model_type": "llama", **SHAPES[shape]}
    return training_memory(model, RopeExtension(target_context=tokens), settings, "cuda", "bfloat16", "offloaded")


def print_contexts(trainings: list[str], attention: str) -> None:
    """Print the longest contexts of trainings, ``SHAPE/RANK``, on cards of :data:`CARDS_GIB`."""
    print(f"| training | {' | '.join(f'{size} GiB' for size in CARDS_GIB)} |")
    print(f"|:--|{'--:|' * len(CARDS_GIB)}")
    for training in trainings:
        shape, rank = training.split("/")
        peaks: dict[int, int] = {}

        def peak_at(tokens: int, shape=shape, rank=rank, peaks=peaks) -> int:
            if tokens not in peaks:
                peaks[tokens] = memory_at(shape, int(rank), tokens, attention).peak
            return peaks[tokens]

        print(f"| {training} |", end="", flush=True)
        for size in CARDS_GIB:
            print(f" {longest_context(size * GIB, peak_at):,} |", end="", flush=True)
        print()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", default=STEPS, metavar="SHAPE/TOKENS", help=f"shapes: {', '.join(SHAPES)}")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help=str(FORMS))
    parser.add_argument("--compute-type", choices=COMPUTE_TYPES, default="bfloat16", help="float16: as on a V100")
    parser.add_argument("--attention", choices=["shifted_sparse", "full"], default="shifted_sparse")
    parser.add_argument("--contexts", nargs="+", metavar="SHAPE/RANK", help="print longest contexts instead")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    print(f"## Memory of a training step, traced, {date.today().isoformat()}\n")
    print(f"`{shlex.join([os.path.basename(sys.executable), *sys.argv])}`; {packages}. Sizes in GiB.\n")
    if arguments.contexts:
        print_contexts(arguments.contexts, arguments.attention)
        return
    print(f"| step | base | peak | {' | '.join(PARTS)} | in addition: paged Adam state | peak at |")
    print(f"|:--|:--|{'--:|' * (len(PARTS) + 2)}:--|")
    for name in arguments.steps:
        shape, tokens = name.split("/")
        for form in arguments.forms:
            step = step_of(shape, int(tokens), form, arguments.compute_type, arguments.attention)
            print(table_row(name, form, step, trace_step(step)), flush=True)


if __name__ == "__main__":
    main()
