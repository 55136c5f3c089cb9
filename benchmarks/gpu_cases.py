"""Cases of the GPU check that need no data: the machine, paged memory, steps, generation; numbers are in ``gpu_numerics``.

Each is a generator that yields parts of its line.
"""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from unittest.mock import patch

import torch
import training_cases  # first: it lets longqlora be imported where something is missing
from gpu_numerics import MICRO_STEPS, TooFar
from measuring import GIB, MIB, best_seconds, held_memory, peak_memory, timed
from torch.autograd import DeviceType
from torch.nn.functional import silu
from training_cases import CASES, matmul_rate, prepare_case, set_up_ceiling, step_flops, step_of
from transformers.models.llama import modeling_llama

from longqlora.evaluation.retrieval import answer
from longqlora.evaluation.retrieval_tasks import Prompt
from longqlora.jobs.machine import machine, versions
from longqlora.modeling.devices import compute_dtype, dtype_name, find_device, keep_freed_memory
from longqlora.training.activations import Form, forms_on

AUTOCAST_TYPES = (
    "longqlora.modeling.loading",
    "longqlora.training.adapters",
    "longqlora.training.arguments",
    "longqlora.training.train",
    "training_cases",
)
SHOWN_KERNELS = 40


@contextmanager
def compute_in(dtype: str | None):
    """Let the project take ``float16`` (a V100's type) for what the device computes fastest in; None: leave it as it is."""
    with ExitStack() as stack:
        for module in AUTOCAST_TYPES if dtype else ():
            stack.enter_context(patch(f"{module}.compute_dtype", lambda device: getattr(torch, dtype)))
        yield


def memory_of(device: torch.device) -> dict[str, float]:
    """Peaks in GiB since ``held_memory``; on a GPU also what the whole device has in use now, CUDA's contexts included."""
    found = {"peak_allocated_gib": round(peak_memory(device) / GIB, 3)}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        found["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 3)
        found["device_used_gib"] = round((total - free) / GIB, 3)
    return found


# The machine


def probe(device: str) -> Iterator[dict]:
    """Versions, the card, and what the machine can do: matrix products, copies, the link to the host."""
    where = find_device(device)
    yield {"versions": versions() | installed("triton", "numpy"), "machine": machine()}
    from bitsandbytes.cextension import lib

    yield {"bitsandbytes_library": type(lib).__name__, "compute_type": dtype_name(compute_dtype(where))}
    if where.type == "cuda":
        yield describe_card()
    ceiling, _ = set_up_ceiling(device)
    yield {"copy_gb_per_s": round(ceiling["copy_bytes_per_second"] / 1e9, 1), "stand_ins": ceiling["stand_ins"]}
    rates = {ceiling["matmul_dtype"]: ceiling["matmul_flops"]}
    if where.type == "cuda":
        rates["float16"] = matmul_rate(ceiling["matmul_size"], torch.float16, where)
        yield link_rates(where)
    yield {"matmul_tflops": {dtype: round(rate / 1e12, 3) for dtype, rate in rates.items()}}


def installed(*packages: str) -> dict[str, str | None]:
    """Versions of packages."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def describe_card() -> dict:
    """The GPU, its driver, and how torch allocates on it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = None
    free, total = torch.cuda.mem_get_info()
    kept = torch.ones(MIB, device="cuda")
    expandable = [segment.get("is_expandable") for segment in torch.cuda.memory_snapshot()]
    del kept
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "driver": driver,
        "memory_gib": round(total / GIB, 1),
        "free_gib": round(free / GIB, 1),
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
        "segments_are_expandable": bool(expandable) and all(expandable),
    }


def link_rates(device: torch.device, num_bytes: int = 256 * MIB) -> dict[str, float]:
    """Bandwidth between the GPU and pinned memory of the host."""
    pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    on_gpu = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    to_host = best_seconds(lambda: pinned.copy_(on_gpu, non_blocking=True), True)
    from_host = best_seconds(lambda: on_gpu.copy_(pinned, non_blocking=True), True)
    return {
        "to_host_gb_per_s": round(num_bytes / to_host / 1e9, 1),
        "from_host_gb_per_s": round(num_bytes / from_host / 1e9, 1),
    }


def use_paged_memory(device: str) -> Iterator[dict]:
    """The managed memory that paged optimizers keep their state in: 4 MiB of it, written and read on both sides."""
    where = find_device(device)
    if where.type != "cuda":
        yield {"paged": False}
        return
    from bitsandbytes.functional import fill, get_paged, prefetch_tensor

    buffer = get_paged(1024, 1024, device=where)
    fill(buffer, 3.0)
    prefetch_tensor(buffer)
    torch.cuda.synchronize()
    if buffer.sum() != 3 * 2**20:
        raise TooFar(f"4 MiB of paged memory filled with 3 have the sum {buffer.sum()}, not {3 * 2**20}")
    yield {"paged": True}


# Steps


def take_steps(
    device: str, case: str, shape: str, tokens: int, repetitions: int, paged: bool, *, dtype: str | None = None,
    form: Form | None = None, documents: int = 1, compiled: bool = False, profile: bool = False,
) -> Iterator[dict]:  # fmt: skip
    """Steps of a case on a 4-bit base with random weights; those that train have two micro-steps.

    Args:
        case: of ``training_cases.CASES``.
        dtype: to compute in; None: the device's.
        form: which activations are kept, see ``longqlora.training.activations``; None: the case's.
        documents: in the window, kept apart.
        compiled: see :func:`compiled_operations`.
        profile: report the kernels that take longest as well.
    """
    where, kind, started = find_device(device), CASES[case], time.perf_counter()
    keep_freed_memory(where)
    with compute_in(dtype), compiled_operations(where) if compiled else nullcontext():
        model = prepare_case(kind, shape, "nf4", tokens, where, form=form if form in forms_on(where.type) else None)
        if documents > 1:
            parts = torch.arange(tokens).tensor_split(documents)
            positions = torch.cat([torch.arange(len(part)) for part in parts])[None].to(where)  # [1, n]
            model.forward = partial(model.forward, position_ids=positions)
        loaded, compute_type = held_memory(where), dtype_name(compute_dtype(where) if dtype is None else getattr(torch, dtype))
        loading = round(time.perf_counter() - started, 1)
        yield {"loading_s": loading, "loaded_gib": round(loaded / GIB, 3), "compute_type": compute_type}
        micro_steps = MICRO_STEPS if kind.is_training else 1
        step = step_of(kind, model, shape, tokens, where, micro_steps=micro_steps, paged=paged)
        rows = [timed(step, where) for _ in range(1 + repetitions)]
        yield describe_steps(rows, micro_steps * tokens, micro_steps * step_flops(shape, case, tokens)) | memory_of(where)
        if profile:
            yield {"profile_ms": profile_kernels(step, where)}


@contextmanager
def compiled_operations(device: torch.device) -> Iterator[None]:
    """Let torch compile what is left of a LLaMA layer's operations element by element, rotation and SwiGLU, each to one kernel.

    An experiment, which the project does not use before a measurement says what it brings. On a CPU nothing is compiled to a
    kernel, which would need a C++ compiler.
    """
    compile_function = partial(torch.compile, dynamic=False, backend="inductor" if device.type == "cuda" else "aot_eager")
    gated = compile_function(lambda gate, up: silu(gate) * up)

    def swiglu(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))

    rotation = compile_function(modeling_llama.apply_rotary_pos_emb)
    with (
        patch.object(modeling_llama, "apply_rotary_pos_emb", rotation),
        patch.object(modeling_llama.LlamaMLP, "forward", swiglu),
    ):
        yield


def describe_steps(rows: list[dict], tokens: int, flops: float) -> dict:
    """Times and losses of steps, the first one apart; the speed is that of the fastest.

    Args:
        rows: of ``measuring.timed``.
        tokens, flops: of a step.
    """
    first, *counted = rows
    seconds = min(row["seconds"] for row in counted)
    return {
        "first_step_s": round(first["seconds"], 4),
        "step_s": [round(row["seconds"], 4) for row in counted],
        "losses": [round(row["loss"], 4) for row in rows],
        "tokens_per_s": round(tokens / seconds),
        "tflops": round(flops / seconds / 1e12, 3),
    }


def profile_kernels(step: Callable[[], object], device: torch.device) -> dict[str, list]:
    """The kernels (on a CPU: operations) of a step that take longest: milliseconds and number of calls."""
    kinds, key, counted = [torch.profiler.ProfilerActivity.CPU], "self_cpu_time_total", DeviceType.CPU
    if device.type == "cuda":
        kinds, key, counted = [*kinds, torch.profiler.ProfilerActivity.CUDA], "self_device_time_total", DeviceType.CUDA
    with torch.profiler.profile(activities=kinds) as profiled:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    rows = [row for row in profiled.key_averages() if row.device_type == counted and not row.is_user_annotation]
    rows.sort(key=lambda row: -getattr(row, key))
    return {row.key[:110]: [round(getattr(row, key) / 1e3, 2), row.count] for row in rows[:SHOWN_KERNELS]}


def generate(device: str, shape: str, tokens: int, new_tokens: int = 16) -> Iterator[dict]:
    """How long a 4-bit model takes to read a long prompt, and for each new token, when it answers as in the retrieval tests."""
    where = find_device(device)
    model = prepare_case(CASES["forward"], shape, "nf4", tokens, where)
    held_memory(where)
    vocab_size = training_cases.SHAPES[shape]["vocab_size"]
    ids = torch.randint(vocab_size, (tokens - 2 * new_tokens,)).tolist()
    tokenizer = SimpleNamespace(batch_decode=lambda rows, **options: [""] * len(rows))
    seconds = []
    for new in (1, 1, 1 + new_tokens):
        started = time.perf_counter()
        answer(model, tokenizer, [Prompt(ids, ["nothing"])], new, stop=[vocab_size])  # no token, so no answer ends early
        seconds.append(time.perf_counter() - started)
    yield {
        "prefill_s": round(seconds[1], 3),
        "s_a_new_token": round((seconds[2] - seconds[1]) / new_tokens, 4),
        "prompt_tokens": len(ids),
        **memory_of(where),
    }
