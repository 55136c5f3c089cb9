"""Bytes that operations element by element move in a QLoRA training step, traced without a GPU.

    python benchmarks/traffic.py                                           # a minute; no GPU, no network, no data
    python benchmarks/traffic.py --steps 7b/8192 --by-operation
    python benchmarks/traffic.py --steps 7b/8192 --dropout 0 --attention full

Counted are the tensors that each operation reads and writes, in the trace of ``longqlora.planning.traced_jobs``. Not counted:
products of matrices, attention, the loss, dequantization, and operations that only make another view. A layer is the difference
of models of three layers and of two. Operations that torch computes in one kernel on a GPU are counted as one.
"""

import argparse
import gc
import os
import re
import shlex
import sys
from collections import Counter
from datetime import date

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_cases import ADAPTER, SHAPES

from longqlora.config.settings import RopeExtension
from longqlora.jobs.machine import versions
from longqlora.planning.fake_models import with_layers
from longqlora.planning.memory_trace import MemoryTrace, fake_tensors
from longqlora.planning.traced_jobs import TrainingStep, build_step, pretended_device, take_micro_step
from longqlora.planning.work import shape_of

STEPS = ("7b/8192", "13b/12288", "8b/32768")
FORMS = ("all", "linear_outputs", "layer_inputs")
DTYPES = {"bfloat16": True, "float16": True, "float32": False}  # whether they are a GPU's


class Traffic(TorchDispatchMode):
    """Counts bytes.

    Attributes:
        by_operation: bytes that were read and written, by the operation's name.
    """

    uncounted = re.compile(
        r"view|^t$|transpose|expand|slice$|split|select$|detach|alias|squeeze|empty|device|mm_?$|scaled_dot|cross_entropy|4bit"
    )

    def __init__(self):
        super().__init__()
        self.by_operation: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        name = function.__name__.split(".")[0]
        if not self.uncounted.search(name):
            read = arguments[1:] if name == "copy_" else arguments  # it reads its source alone
            leaves = tree_leaves((read, keywords, result))
            self.by_operation[name] += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))
        return result


def traffic_of_step(step: TrainingStep) -> Counter[str]:
    """Bytes that a forward and backward pass moves, by operation."""
    gc.collect()
    with pretended_device(step), fake_tensors(MemoryTrace()), Traffic() as traffic:
        model = build_step(step)
        traffic.by_operation.clear()
        take_micro_step(model, step)
    return traffic.by_operation


def traffic_of_layer(shape: str, tokens: int, form: str, dtype: str, **settings) -> Counter[str]:
    """The same of one layer more."""
    model = {"model_type": "llama", **SHAPES[shape]}
    extension, training = RopeExtension(target_context=tokens), ADAPTER.model_copy(update=settings)
    two, three = (
        traffic_of_step(
            TrainingStep(with_layers(model, layers), extension, training, DTYPES[dtype], getattr(torch, dtype), form)
        )
        for layers in (2, 3)
    )
    return three - two


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", default=STEPS, metavar="SHAPE/TOKENS", help=f"shapes: {', '.join(SHAPES)}")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"], help="float32: on a CPU")
    parser.add_argument("--attention", choices=["shifted_sparse", "full"], default="shifted_sparse")
    parser.add_argument("--dropout", type=float, default=ADAPTER.dropout)
    parser.add_argument("--method", choices=["qlora", "full"], default="qlora")
    parser.add_argument("--by-operation", action="store_true")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    print(f"## Traffic of a training step, traced, {date.today().isoformat()}\n")
    print(f"`{shlex.join([os.path.basename(sys.executable), *sys.argv])}`; {packages}.\n")
    print("| step | type | form | bytes by token, layer, and element of linear layers | GB of a micro-step |")
    print("|:--|:--|:--|--:|--:|")
    settings = {name: getattr(arguments, name) for name in ("attention", "dropout", "method")}
    for step in arguments.steps:
        name, tokens = step.split("/")
        shape = shape_of(SHAPES[name])
        elements = int(tokens) * shape.layer_elements
        for dtype in arguments.dtypes:
            for form in arguments.forms:
                found = traffic_of_layer(name, int(tokens), form, dtype, **settings)
                total = found.total()
                print(f"| {step} | {dtype} | {form} | {total / elements:.1f} | {total * shape.layers / 1e9:.0f} |", flush=True)
                if arguments.by_operation:
                    for operation, num_bytes in found.most_common():
                        print(f"| | | {operation} | {num_bytes / elements:.2f} | {num_bytes * shape.layers / 1e9:.0f} |")


if __name__ == "__main__":
    main()
