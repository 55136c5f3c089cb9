"""Do the types of a 4-bit base change what is learned? The same training in float32 and in 16 bit, and the adapters' losses.

    python benchmarks/precision.py --base MODEL --data TOKENS.bin --tokens 256 --steps 50

Each run trains a LoRA adapter on the NF4 base with the same windows in the same order; a base whose context is shorter than a
window is extended (linear). The types of a GPU are forced on a CPU (``longqlora.training.adapters.add_adapter``), autocast
included; in float16 the loss is scaled, as the trainer does. The seed is that of the adapter and of the dropout: the difference
between two seeds is the noise that the others are to be compared with.

The last windows are not trained on. Each adapter is scored on them twice: in the types it was trained in, and on a base that
computes in float32 throughout, where a difference can only come from the adapter's weights.
"""

import argparse
import os
import shlex
import sys
import time
from datetime import date
from statistics import fmean, stdev
from typing import NamedTuple
from unittest.mock import patch

import torch
from bitsandbytes.nn import Linear4bit
from torch.nn.utils import clip_grad_norm_
from transformers import AutoConfig

from longqlora.config.settings import RopeExtension, TrainingSettings
from longqlora.data.packing import load_training_data
from longqlora.jobs.machine import machine, versions
from longqlora.modeling.attention import register_shifted_sparse_attention
from longqlora.modeling.chunked_loss import use_chunked_loss
from longqlora.modeling.loading import load_model
from longqlora.modeling.rope import context_of
from longqlora.training.adapters import FLOAT32, BaseDtypes, add_adapter

CPU = torch.device("cpu")
SHOWN_STEPS = (1, 10, 25, 50)


class Run(NamedTuple):
    dtypes: BaseDtypes
    autocast: torch.dtype


RUNS = {
    "base in float32, autocast bfloat16": Run(FLOAT32, torch.bfloat16),
    "base in bfloat16 (A100 and newer)": Run(BaseDtypes(torch.bfloat16, torch.bfloat16), torch.bfloat16),
    "residual stream in float32, layers in float16 (V100)": Run(BaseDtypes(torch.float32, torch.float16), torch.float16),
    "base in float32, autocast float16": Run(FLOAT32, torch.float16),
}
NUMBERED = [f"{number} {name}" for number, name in enumerate(RUNS, start=1)]


def load_base(arguments: argparse.Namespace, compute_dtype: torch.dtype):
    """The base in NF4, whose linear layers compute in the type that a GPU would."""
    attention = arguments.attention
    if attention == "shifted_sparse":
        attention = register_shifted_sparse_attention(0.25, arguments.tokens)
    is_short = context_of(AutoConfig.from_pretrained(arguments.base)) < arguments.tokens
    with patch("longqlora.modeling.loading.compute_dtype", lambda device: compute_dtype):
        model = load_model(
            arguments.base,
            device=CPU,
            precision="nf4",
            extension=RopeExtension(target_context=arguments.tokens) if is_short else None,
            attn_implementation=attention,
        )
    return use_chunked_loss(model)


def load_windows(arguments: argparse.Namespace) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The windows to train on, in their order, and the held-out ones: the last of the stream. A shorter last one is dropped."""
    data = load_training_data(arguments.data, arguments.tokens)
    windows = [data[index]["input_ids"] for index in range(len(data))]
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0)).tolist()
    num_whole = sum(len(window) == arguments.tokens for window in windows)
    first_held_out = num_whole - arguments.held_out
    return [windows[index] for index in order if index < first_held_out], windows[first_held_out:num_whole]


def train(arguments: argparse.Namespace, run: Run, seed: int, windows: list[torch.Tensor]):
    """Train, and return the model and the loss of each step."""
    model = load_base(arguments, run.autocast)
    torch.manual_seed(seed)
    model = add_adapter(model, TrainingSettings(rank=arguments.rank), base=run.dtypes).train()
    weights = trainable(model)
    optimizer = torch.optim.AdamW(weights, lr=arguments.learning_rate, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", enabled=run.autocast is torch.float16)
    losses = []
    for step in range(arguments.steps):
        rows = [(step * arguments.batch_size + row) % len(windows) for row in range(arguments.batch_size)]
        ids = torch.stack([windows[row] for row in rows])
        with torch.autocast("cpu", run.autocast):
            loss = model(input_ids=ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(weights, arguments.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


def trainable(model) -> list[torch.nn.Parameter]:
    return [weight for weight in model.parameters() if weight.requires_grad]


@torch.no_grad()
def score(model, windows: list[torch.Tensor], autocast: torch.dtype = torch.float32) -> list[float]:
    """The loss of each window in evaluation mode: no dropout, full attention.

    The 4-bit layers stay in training mode, which changes nothing that they compute. In evaluation mode bitsandbytes (0.49 and
    newer) repacks their weights on some CPUs, and a training after that gets wrong gradients.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.training = True
    with torch.autocast("cpu", autocast, enabled=autocast is not torch.float32):
        return [model(input_ids=ids[None], labels=ids[None]).loss.item() for ids in windows]


def table_row(name: str, losses: list[float], reference: list[float]) -> str:
    """Losses at some steps, and how far they are from the reference: on average, at most, and with the sign."""
    shown = [f"{losses[step - 1]:.4f}" if step <= len(losses) else "" for step in SHOWN_STEPS]
    differences = [loss - other for loss, other in zip(losses, reference, strict=True)]
    sizes = [abs(difference) for difference in differences]
    apart = [f"{fmean(sizes):.6f}", f"{max(sizes):.6f}", f"{fmean(differences):+.6f}"]
    return f"| {' | '.join([name, *shown, *([''] * 3 if losses is reference else apart)])} |"


def held_out_row(name: str, base: list[float], *scores: tuple[list[float], list[float]]) -> str:
    """Mean loss of the untrained base, then of the adapter and its difference to the reference ± the standard error."""
    cells = [name, f"{fmean(base):.4f}"]
    for losses, reference in scores:
        differences = [loss - other for loss, other in zip(losses, reference, strict=True)]
        error = stdev(differences) / len(differences) ** 0.5
        cells += [f"{fmean(losses):.4f}", "" if losses is reference else f"{fmean(differences):+.5f} ± {error:.5f}"]
    return f"| {' | '.join(cells)} |"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="folder of a RoPE model")
    parser.add_argument("--data", required=True, help=".bin of token ids, made with its tokenizer")
    parser.add_argument("--tokens", type=int, default=256, help="of a window (256)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--max-grad-norm", type=float, default=0.3)
    parser.add_argument("--attention", choices=["shifted_sparse", "sdpa"], default="shifted_sparse")
    parser.add_argument("--held-out", type=int, default=32, help="windows to score the adapters on, two or more (32)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="of the adapter and the dropout (1 2)")
    parser.add_argument(
        "--runs", type=int, nargs="*", default=range(2, len(RUNS) + 1), help=f"in addition to 1: {', '.join(NUMBERED)}"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    where, packages = machine(), ", ".join(f"{name} {version}" for name, version in versions().items())
    print(f"## Losses by the types of the base, {date.today().isoformat()}\n")
    print(
        f"`{shlex.join([os.path.basename(sys.executable), *sys.argv])}`, threads: {torch.get_num_threads()}, {where['cores']}"
    )
    print(f"cores of {where['processor']}, {where['system']}; {packages}.\n")
    print(f"| | {' | '.join(f'step {step}' for step in SHOWN_STEPS)} | mean distance | largest | mean difference |")
    print(f"|:--|{'--:|' * (len(SHOWN_STEPS) + 3)}")
    windows, held_out = load_windows(arguments)
    scorer = add_adapter(load_base(arguments, torch.float32), TrainingSettings(rank=arguments.rank), base=FLOAT32)
    float32_base = score(scorer, held_out)  # the adapter is still zero
    rows, bases, reference = [], {}, None
    for seed in arguments.seeds:
        references = None
        for number, (name, run) in enumerate(RUNS.items(), start=1):
            if number not in {1, *arguments.runs}:
                continue
            started = time.perf_counter()
            model, losses = train(arguments, run, seed, windows)
            as_trained = score(model, held_out, run.autocast)
            if name not in bases:
                with model.disable_adapter():
                    bases[name] = score(model, held_out, run.autocast)
            for weight, trained in zip(trainable(scorer), trainable(model), strict=True):
                weight.data.copy_(trained)
            scores = score(scorer, held_out), as_trained
            print(f"{name}, seed {seed}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
            reference, references = reference or losses, references or scores
            print(table_row(f"{name}, seed {seed}", losses, reference), flush=True)
            rows.append(held_out_row(f"{name}, seed {seed}", bases[name], *zip(scores, references, strict=True)))
    print(f"\nThe last {len(held_out)} windows, not trained on; untrained base in float32: {fmean(float32_base):.4f}.")
    print("Differences are those to the first run of the same seed, ± the standard error over the windows.\n")
    print("| | untrained base in these types | adapter in float32 | difference | adapter in these types | difference |")
    print("|:--|--:|--:|--:|--:|--:|", *rows, sep="\n")


if __name__ == "__main__":
    main()
