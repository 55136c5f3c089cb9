"""Speed and peak memory of a training step, against transformers' plain path and the published LongQLoRA step.

    python benchmarks/training.py                               # on a CPU; no network, no GPU
    PYTHONPATH=. python benchmarks/training.py --device cuda    # LLaMA2-7B and 13B shapes; nothing needs installing

The cases, all with a LoRA adapter of rank 64 on every linear layer, activation checkpointing and a batch of one window:

* ours: causal S² attention by the fused kernel, chunked loss, non-reentrant checkpointing (``longqlora``);
* ours_full: the same with full attention;
* plain: transformers' SDPA attention, and its loss over all logits of the window;
* published: S² attention as first published (scores materialised, the sequence rolled), logits of the window in float32,
  reentrant checkpointing; written anew from its description;
* perplexity: no training, but the evaluation of a window (``longqlora.perplexity.score``), full attention, no adapter.

A step is forward, backward, clipping and AdamW. Weights are random, the same in all cases, made and quantised layer by layer;
so are the tokens. Each case is a process of its own. On a CPU those of one length take their steps in turn; on a GPU, where
one alone may fill the memory, one case follows the other. Times are medians, one step before them not counted. Memory is the
peak of the process (VmHWM) or of torch's allocator on a GPU, which does not see a paged optimizer's state; "above the
weights" is without what there was when model and adapter were loaded.

Shapes: b batch, n tokens of a window, h heads, d width of a head, G tokens of a group.
"""

import argparse
import ctypes
import importlib
import importlib.util
import json
import multiprocessing
import os
import resource
import shlex
import signal
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import date
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import MethodType
from unittest.mock import MagicMock

try:
    import numpy
    import torch
    from torch.nn.functional import cross_entropy
    from torch.utils.checkpoint import checkpoint
    from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_outputs import CausalLMOutput

    from longqlora.provenance import machine, versions
except ImportError as missing:
    raise SystemExit(
        f"{missing}. The benchmark needs torch, transformers (5 or newer) and peft, bitsandbytes for a 4-bit base, and this "
        "project: installed, or PYTHONPATH=. in its root"
    ) from missing


def llama(hidden_size: int, intermediate_size: int, layers: int, heads: int, context: int, vocab_size: int = 32000) -> dict:
    """A shape in the words of ``LlamaConfig``."""
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": context,
        "vocab_size": vocab_size,
    }


SHAPES = {
    "toy": llama(64, 128, 2, 4, context=64, vocab_size=512),
    "small": llama(512, 1376, 6, 8, context=2048),
    "7b": llama(4096, 11008, 32, 32, context=4096),
    "13b": llama(5120, 13824, 40, 40, context=4096),
}
DEFAULTS = {  # of each device
    "cpu": {"shapes": ["small"], "lengths": [2048, 8192], "cases": ["ours", "ours_full", "plain", "published"]},
    "cuda": {
        "shapes": ["7b", "13b"],
        "lengths": [4096, 8192, 12288, 16384, 32768],
        "cases": ["ours", "ours_full", "plain", "published", "perplexity"],
    },
}
GROUP_RATIO = 0.25
ADAPTER = {  # the paper's
    "rank": 64,
    "alpha": 16,
    "dropout": 0.05,
    "target_modules": "all-linear",
    "modules_to_save": [],
    "zero_stage": 0,
}
LEARNING_RATE, MAX_GRAD_NORM = 2e-4, 0.3
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Case:
    """What distinguishes a case: its attention (``shifted_sparse``, ``sdpa``, ``published``), its loss (``chunked``, over the
    ``whole`` window, or ``plain``, as transformers does it; None: no training), and the kind of its checkpointing."""

    attention: str
    loss: str | None
    reentrant: bool = False


CASES = {
    "ours": Case("shifted_sparse", "chunked"),
    "ours_full": Case("sdpa", "chunked"),
    "plain": Case("sdpa", "plain"),
    "published": Case("published", "whole", reentrant=True),
    "perplexity": Case("sdpa", None),
}


# The published step


def published_mask(*, q_length: int, device, dtype=torch.float32, **request) -> torch.Tensor:
    """Causality inside a group, to be added to its scores: ``[1, 1, G, G]``; made once per forward pass."""
    group = int(q_length * GROUP_RATIO)
    return torch.full((group, group), torch.finfo(dtype).min, dtype=dtype, device=device).triu(1)[None, None]


def published_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """S² attention as first published: the second half of the heads is rolled by half a group, so that the first G/2 tokens
    share a group with the last G/2, which they see although those are their future.

    Args:
        query, key, value: ``[b, h, n, d]``, n a multiple of G.
        attention_mask: ``[1, 1, G, G]``, see :func:`published_mask`.

    Returns:
        ``[b, n, h, d]``, None
    """
    (batch, heads, tokens, width), group = query.shape, attention_mask.shape[-1]
    if tokens % group:
        raise ValueError(f"{tokens} tokens are no multiple of the group of {group}")

    def roll_half(x, by):  # [b, n, h, d]
        straight, shifted = x.chunk(2, dim=2)
        return torch.cat([straight, shifted.roll(by, dims=1)], dim=2)

    def fold(x):
        x = roll_half(x.transpose(1, 2), -(group // 2))  # [b, n, h, d]
        return x.reshape(batch * tokens // group, group, heads, width).transpose(1, 2)  # [b · n / G, h, G, d]

    query, key, value = fold(query), fold(key), fold(value)
    scores = query @ key.transpose(2, 3) * (scaling or width**-0.5) + attention_mask  # [b · n / G, h, G, G]
    shares = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    out = (shares @ value).transpose(1, 2).reshape(batch, tokens, heads, width)
    return roll_half(out, group // 2), None


def register_published_attention() -> str:
    """Register it with transformers and return its name."""
    AttentionInterface.register("published_shifted_sparse", published_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("published_shifted_sparse", published_mask)
    return "published_shifted_sparse"


def use_whole_window_loss(model):
    """Make ``model(input_ids, labels=…)`` compute its loss from the float32 logits of the whole window, as published."""
    logits_of = model.forward

    def forward(self, input_ids, labels, **kwargs):
        logits = logits_of(input_ids=input_ids, **kwargs).logits.float()  # [b, n, vocabulary]
        return CausalLMOutput(loss=cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))

    model.forward = MethodType(forward, model)
    return model


# Bare machines


def checkpointed_cross_entropy(hidden, weight, targets, reduction="none", options=None) -> torch.Tensor:
    """What ``linear_cross_entropy`` gives, 1024 positions at a time whose logits are computed again in the backward pass.

    Args:
        hidden: ``[positions, width]``
        weight: ``[vocabulary, width]``
        targets: ``[positions]``

    Returns:
        ``[positions]``
    """

    def losses(states, ids):
        return cross_entropy((states @ weight.T).float(), ids, reduction=reduction)

    chunks = zip(hidden.split(1024), targets.split(1024), strict=True)
    return torch.cat([checkpoint(losses, *chunk, use_reentrant=False) for chunk in chunks])


def stand_in_for_missing() -> list[str]:
    """Let ``longqlora`` be imported where something is missing that no step needs, or for which there is a replacement here;
    return what that was."""
    missing = []
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        missing.append("torch.nn.functional.linear_cross_entropy (ours uses a chunked loss of the benchmark instead)")
        torch.nn.LinearCrossEntropyOptions = dict
        torch.nn.functional.linear_cross_entropy = checkpointed_cross_entropy
    for name in ("torch.utils.tensorboard", "pyarrow", "pyarrow.compute"):  # events, and data from disk
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(f"{name} (no step needs it)")
            sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None), __path__=[])
    return missing


# Models


def build_model(shape: str, precision: str, length: int, device: torch.device, attention: str):
    """A LLaMA with random weights, extended to ``length`` tokens if its own context is shorter.

    The model begins without storage and gets one weight after the other, quantised at once, so that at no time there is a
    16-bit copy of it.

    Args:
        precision: of the linear layers: ``nf4``, or ``auto``, as :func:`longqlora.models.load_model` takes it.
    """
    from longqlora.models import autocast_dtype, resident_dtype
    from longqlora.positions import extend_context

    config = LlamaConfig(**SHAPES[shape], use_cache=False, bos_token_id=1, eos_token_id=2)
    if length > config.max_position_embeddings:
        extend_context(config, length)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    torch.manual_seed(1)
    for name, module in list(model.named_modules()):
        for key, weight in list(module.named_parameters(recurse=False)):
            new = torch.empty(weight.shape, dtype=resident_dtype(device), device=device)
            new = new.normal_(std=0.02) if new.ndim == 2 else new.fill_(1)
            if precision == "nf4" and isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
                model.set_submodule(name, quantised_layer(new, autocast_dtype(device)))
            else:
                setattr(module, key, torch.nn.Parameter(new, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)  # its frequencies are no parameters
    model.is_loaded_in_4bit = precision == "nf4"  # peft asks
    return model


def quantised_layer(weight: torch.Tensor, compute_dtype: torch.dtype):
    """A linear layer in NF4 with double quantisation.

    Args:
        weight: ``[out, in]``
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    rows, columns = weight.shape
    layer = Linear4bit(columns, rows, bias=False, compute_dtype=compute_dtype, quant_type="nf4", device="meta")
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer).to(weight.device)
    return layer.requires_grad_(False)


def prepare_case(case: Case, shape: str, precision: str, length: int, device: torch.device):
    """The model of a case, with its attention, loss, adapter and checkpointing."""
    from longqlora.attention import register_shifted_sparse_attention
    from longqlora.models import use_chunked_loss
    from longqlora.training import add_adapter

    attention = {
        "shifted_sparse": lambda: register_shifted_sparse_attention(GROUP_RATIO),
        "published": register_published_attention,
        "sdpa": lambda: "sdpa",
    }[case.attention]()
    model = build_model(shape, precision, length, device, attention)
    if case.loss is None:
        return model.eval()
    if case.loss != "plain":
        {"chunked": use_chunked_loss, "whole": use_whole_window_loss}[case.loss](model)
    torch.manual_seed(2)
    model = add_adapter(model, {**ADAPTER, "method": "qlora" if precision == "nf4" else "lora"})
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": case.reentrant})
    if case.reentrant:
        model.enable_input_require_grads()
    return model.train()


def training_step(model, ids: torch.Tensor) -> Callable[[], float]:
    """A function that trains on a batch once and returns the loss.

    Args:
        ids: ``[b, n]``
    """
    from longqlora.models import autocast_dtype

    weights, dtype = [weight for weight in model.parameters() if weight.requires_grad], autocast_dtype(ids.device)
    if ids.is_cuda and importlib.util.find_spec("bitsandbytes"):
        from bitsandbytes.optim import PagedAdamW32bit as AdamW
    else:
        from torch.optim import AdamW
    optimizer = AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)

    def step() -> float:
        torch.manual_seed(3)  # the dropout of all cases is the same
        with nullcontext() if dtype is torch.float32 else torch.autocast(ids.device.type, dtype):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def evaluation_step(model, ids: torch.Tensor) -> Callable[[], float]:
    """A function that scores a window and returns the mean negative log-likelihood.

    Args:
        ids: ``[1, n + 1]``
    """
    from longqlora.perplexity import score

    tokens = ids[0].cpu().numpy().astype(numpy.int64)
    return lambda: score(model, tokens, window=len(tokens) - 1, stride=len(tokens) - 1).mean_nll


# The process of a case


def status_bytes(key: str, path: str = "/proc/self/status") -> int:
    """A quantity of this process or machine from Linux, in bytes."""
    (line,) = (line for line in Path(path).read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def held_memory(device: torch.device) -> int:
    """Bytes that this process holds; the peak begins anew from here."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # what loading has left
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held since :func:`held_memory`."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else status_bytes("VmHWM")


def limit_memory() -> None:
    """Let an allocation fail that goes beyond what the machine has free now, less 1 GiB; Linux would kill some process."""
    limit = status_bytes("VmData") + max(0, status_bytes("MemAvailable", "/proc/meminfo") - GIB)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))


def set_up_case(name: str, shape: str, precision: str, length: int, device_name: str) -> tuple[dict, Callable[[], dict]]:
    """Load the model of a case; return what it holds, and a function that takes a step and reports it."""
    stand_in_for_missing()
    from longqlora.models import find_device

    device, case = torch.device(device_name), CASES[name]
    model = prepare_case(case, shape, precision, length, device)
    loaded = held_memory(device)
    find_device(device_name)  # only now, so that what loading frees is not kept
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(SHAPES[shape]["vocab_size"], (1, length + (case.loss is None)), generator=generator).to(device)
    step = evaluation_step(model, ids) if case.loss is None else training_step(model, ids)

    def report() -> dict:
        if device.type == "cpu":
            limit_memory()
        started = time.perf_counter()
        loss = step()  # which waits for the device
        if device.type == "cuda":
            torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - started, "loss": loss, "peak_bytes": peak_memory(device)}

    return {"loaded_bytes": loaded}, report


def set_up_ceiling(device_name: str) -> tuple[dict, None]:
    """What the machine can do: rate of a square matrix product in the autocast type, and bandwidth of a copy (read + write)."""
    stand_in_for_missing()
    from longqlora.models import autocast_dtype, find_device, name_of

    device = find_device(device_name)
    on_gpu, dtype = device.type == "cuda", autocast_dtype(device)
    size, num_bytes = (8192, GIB) if on_gpu else (2048, 256 * MIB)
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target, product = torch.empty_like(source), torch.empty_like(left)
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "matmul_size": size,
        "matmul_dtype": name_of(dtype),
        "matmul_flops": 2 * size**3 / best_seconds(lambda: torch.mm(left, right, out=product), on_gpu),
        "copy_bytes_per_second": 2 * num_bytes / best_seconds(lambda: target.copy_(source), on_gpu),
        "stand_ins": stand_in_for_missing(),
    }, None


def best_seconds(function: Callable[[], object], on_gpu: bool, rounds: int = 5) -> float:
    """Shortest time of a call; on a GPU ten calls are made at once, as launching one costs some microseconds."""
    calls, best = 10 if on_gpu else 1, float("inf")
    for _ in range(rounds):
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            function()
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - started) / calls)
    return best


def serve(connection, set_up: Callable, arguments: tuple) -> None:
    """Body of a process: set up, report, then take a step for every message."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its children
    warnings.simplefilter("ignore", FutureWarning)
    try:
        report, step = set_up(*arguments)
        connection.send(report)
        while connection.recv():
            connection.send(step())
    except Exception as error:
        exhausted = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
        if not exhausted:
            traceback.print_exc()
        connection.send({"failure": "out of memory" if exhausted else f"{type(error).__name__}: {error}".splitlines()[0]})


class Child:
    """A process that sets something up and takes steps on request, for at most ``time_limit`` seconds in all."""

    def __init__(self, set_up: Callable, *arguments, time_limit: float):
        context = multiprocessing.get_context("spawn")  # a fresh process has a fresh peak
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, set_up, arguments), daemon=True)
        self.time_limit, self.left, self.waits = time_limit, time_limit, False
        self.process.start()
        theirs.close()

    def answer(self) -> dict:
        """The process's next report, or why there is none: ``{"failure": …}``."""
        started = time.perf_counter()
        try:
            if self.connection.poll(max(0, self.left)):
                report = self.connection.recv()
                self.waits = "failure" not in report
                return report
            return {"failure": f"over the time limit of {self.time_limit:g} s"}
        except EOFError:
            self.process.join()
            return {"failure": f"ended with exit code {self.process.exitcode}; out of memory?"}
        finally:
            self.left -= time.perf_counter() - started

    def take_step(self) -> dict:
        self.waits = False
        self.connection.send(True)
        return self.answer()

    def stop(self) -> None:
        """End the process: one that waits for a message by telling it, any other at once."""
        if self.waits:
            self.connection.send(False)
            self.process.join(5)
        self.process.kill()
        self.process.join()


# The measurement


def measure_together(rows: list[dict], *, set_up_of: Callable, repetitions: int, time_limit: float, save: Callable) -> None:
    """Measure cases in turn, each in its own process; write into the rows what they report.

    Args:
        rows: one for each case: shape, tokens, case; they get loaded_bytes, peak_bytes, first_seconds, first_loss, seconds
            (a list) and, where there is one, failure.
        set_up_of: row -> arguments of its :class:`Child`.
        save: called after each report.
    """
    children = []
    try:
        children += [Child(*set_up_of(row), time_limit=time_limit) for row in rows]  # they load side by side
        for row, child in zip(rows, children, strict=True):
            print(f"{row['shape']}, {row['tokens']} tokens, {row['case']} …", file=sys.stderr)
            row.update(child.answer())
            if "failure" not in row:
                report = child.take_step()
                row.update({{"seconds": "first_seconds", "loss": "first_loss"}.get(key, key): report[key] for key in report})
            row["seconds"] = []
            end_failed(row, child)
            save()
        for _ in range(repetitions):
            for row, child in zip(rows, children, strict=True):
                if "failure" not in row:
                    report = child.take_step()
                    row["seconds"] += [report.pop("seconds")] if "seconds" in report else []
                    row.update({key: value for key, value in report.items() if key != "loss"})
                    end_failed(row, child)
                    save()
    finally:
        for child in children:
            child.stop()


def end_failed(row: dict, child: Child) -> None:
    """End the process of a case that has failed, so that its memory is free for the others."""
    if "failure" in row:
        print(f"    {row['failure']}", file=sys.stderr)
        child.stop()


def step_flops(shape: str, name: str, tokens: int) -> float:
    """Floating-point operations of a step, what checkpointing computes again included.

    A weight that is frozen costs 2 operations per token forward, 2 again and 2 for the gradient of its input; one of the
    adapter 2 more; the output layer is not computed again. Attention counts what causality leaves, its backward pass 2.5 times
    the forward one (FlashAttention).
    """
    config, case = SHAPES[shape], CASES[name]
    width, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    linear, head = layers * width * (4 * width + 3 * inner), config["vocab_size"] * width
    adapter = layers * ADAPTER["rank"] * (8 * width + 3 * (width + inner))
    seen = tokens if case.attention == "sdpa" else tokens * GROUP_RATIO
    attention = layers * 2 * tokens * seen * width
    if case.loss is None:
        return tokens * 2 * (linear + head) + attention
    return tokens * (6 * linear + 8 * adapter + 4 * head) + 4.5 * attention


# The tables


def median_seconds(row: dict) -> float | None:
    return statistics.median(row["seconds"]) if row.get("seconds") else None


def memory_above(row: dict) -> int | None:
    """Peak above the weights, in bytes."""
    return row["peak_bytes"] - row["loaded_bytes"] if "peak_bytes" in row else None


def step_table(rows: list[dict], ceiling: dict) -> list[str]:
    """A line for each case: speed, memory, share of the machine's matrix product."""
    lines = [
        "| shape | tokens | step | tokens/s | s a step (min to max) | peak above the weights, MiB | peak, GiB | TFLOP/s "
        "| of the matmul rate | first loss | |",
        "|:--|--:|:--|--:|--:|--:|--:|--:|--:|--:|:--|",
    ]
    for row in rows:
        cells, seconds = [row["shape"], row["tokens"], row["case"]], median_seconds(row)
        if seconds:
            spread = f"{seconds:.3g} ({min(row['seconds']):.3g} to {max(row['seconds']):.3g})"
            cells += [f"{row['tokens'] / seconds:.0f}", spread]
        else:
            cells += ["", ""]
        known = "peak_bytes" in row
        cells += [f"{memory_above(row) / MIB:.0f}", f"{row['peak_bytes'] / GIB:.2f}"] if known else ["", ""]
        if seconds:
            rate = step_flops(row["shape"], row["case"], row["tokens"]) / seconds
            cells += [f"{rate / 1e12:.3g}", f"{rate / ceiling['matmul_flops']:.0%}" if "matmul_flops" in ceiling else ""]
        else:
            cells += ["", ""]
        cells += [f"{row['first_loss']:.4f}" if "first_loss" in row else "", row.get("failure", "")]
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
        if row["case"] in ("ours", "perplexity") or not ours:
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

    def speed(shape, tokens, other):
        theirs, ours = (median_seconds(find_row(rows, shape, tokens, case)) for case in (other, "ours"))
        return quotient(theirs, ours)

    def above(shape, tokens, case="ours"):
        return memory_above(find_row(rows, shape, tokens, case))

    def peak(shape, tokens):
        return quotient(find_row(rows, shape, tokens, "ours").get("peak_bytes"), GIB)

    rate = quotient(step_flops("7b", "ours", 8192), median_seconds(find_row(rows, "7b", 8192, "ours")))
    found = {
        "small": [
            ("2048 tokens: speed of ours against published", speed("small", 2048, "published"), 1.5, True),
            ("2048 tokens: memory of ours against published, above the weights",
             quotient(above("small", 2048), above("small", 2048, "published")), 0.5, False),
            ("ours: memory at 8192 tokens against 2048, above the weights",
             quotient(above("small", 8192), above("small", 2048)), 4.4, False),
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
        f"Base in {base}, LoRA of rank {ADAPTER['rank']} on all linear layers, dropout {ADAPTER['dropout']}; b = 1; median of "
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
    parser.add_argument("--cases", choices=CASES, nargs="+", help="default: all; on a CPU all but perplexity")
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
