"""Cases of the GPU check that need no data: the machine, paged memory, numbers against float64, steps, generation.

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
from measuring import GIB, MIB, best_seconds, held_memory, peak_memory, timed
from torch.autograd import DeviceType
from torch.nn.functional import cross_entropy, rms_norm, silu
from training_cases import CASES, matmul_rate, prepare_case, set_up_ceiling, step_flops, step_of
from transformers.models.llama import modeling_llama

from longqlora.evaluation.retrieval import answer
from longqlora.evaluation.retrieval_tasks import Prompt
from longqlora.jobs.machine import machine, versions
from longqlora.modeling.attention import shifted_sparse_attention
from longqlora.modeling.chunked_loss import summed_nll
from longqlora.modeling.devices import compute_dtype, dtype_name, find_device, keep_freed_memory, weight_dtype
from longqlora.modeling.norms import fused
from longqlora.publishing.merging import nf4_round_trip
from longqlora.training.activations import Form, forms_on
from longqlora.training.lora_forward import LoraLinear, draw_dropped, weight_of
from longqlora.training.offloading import offload_inputs

AUTOCAST_TYPES = (
    "longqlora.modeling.loading",
    "longqlora.training.adapters",
    "longqlora.training.arguments",
    "longqlora.training.train",
    "training_cases",
)
LARGEST_ERROR = 0.02  # of a 16-bit result against float64, relative to the norm
LOSS_TYPES = (torch.bfloat16, torch.float16, torch.float32)
MICRO_STEPS = 2  # of a step, so that gradients are there during the second one, as in a training and in the trace
SHOWN_KERNELS = 40


class TooFar(ArithmeticError):
    """A result that differs from the one in float64 by more than rounding."""


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


# Numbers against float64


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Distance of a result from the one in float64, relative to the norm of that one."""
    return float((found.double() - exact).norm() / exact.norm())


def attention_errors(num_tokens: int, with_documents: bool, device: torch.device) -> dict[str, float]:
    """Errors of shifted sparse attention in the device's type: of the output, and of the gradients."""
    dtype = compute_dtype(device)
    inputs = [torch.randn(1, 8, num_tokens, 128, device=device, dtype=dtype) for _ in range(4)]
    documents = [[min(130, num_tokens - begin) for begin in range(0, num_tokens, 130)]] if with_documents else None
    found = []
    for kind in (dtype, torch.float64):
        *leaves, weight = (tensor.detach().to(kind, copy=True) for tensor in inputs)
        leaves = [leaf.requires_grad_() for leaf in leaves]
        out = shifted_sparse_attention(*leaves, 256, documents)  # [1, 8, n, 128]
        out.backward(weight)
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    return dict(zip(("output", "query", "key", "value"), map(relative_error, *found), strict=True))


def nf4_errors(device: torch.device) -> dict[str, float]:
    """Errors of a 4-bit layer against its own weights in float64, for many tokens and for one, which have different kernels.

    Raises:
        TooFar: if the merge's round trip through NF4 does not give the layer's weights, bit for bit.
    """
    from bitsandbytes.functional import dequantize_4bit

    weight = (torch.randn(512, 1024) * 0.02).to(torch.float16)
    layer = training_cases.quantized_layer(weight.to(device, weight_dtype(device)), compute_dtype(device))
    kept = dequantize_4bit(layer.weight.data, layer.weight.quant_state)  # [512, 1024]
    if not torch.equal(nf4_round_trip(weight, device), kept.to("cpu", weight.dtype)):
        raise TooFar("the round trip through NF4 does not give the weights of the 4-bit layer")
    tokens = torch.randn(2048, 1024, device=device, dtype=compute_dtype(device))
    with torch.no_grad():
        exact = tokens.double() @ kept.double().T
        return {"many tokens": relative_error(layer(tokens), exact), "one token": relative_error(layer(tokens[:1]), exact[:1])}


def norm_errors(device: torch.device) -> dict[str, float]:
    """Errors of a norm by torch's kernel under autocast: of the output, and of the gradient."""
    norm = modeling_llama.LlamaRMSNorm(1024).to(device, compute_dtype(device))
    torch.nn.init.normal_(norm.weight, mean=1)
    hidden = torch.randn(2048, 1024, device=device, dtype=norm.weight.dtype).requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    expected = rms_norm(exact, exact.shape[-1:], norm.weight.double(), norm.variance_epsilon)
    with torch.autocast(device.type, compute_dtype(device)):
        found = fused(norm)(hidden)
    direction = torch.randn_like(found)
    found.backward(direction)
    expected.backward(direction.double())
    return {"output": relative_error(found.detach(), expected.detach()), "gradient": relative_error(hidden.grad, exact.grad)}


def lora_errors(device: torch.device) -> dict[str, float]:
    """Errors of a LoRA layer on a 4-bit base under autocast, with dropout: of the output, and of the gradients."""
    dtype, probability = compute_dtype(device), 0.05
    base = training_cases.quantized_layer(torch.randn(512, 1024, device=device, dtype=dtype) * 0.02, dtype)
    x = torch.randn(2048, 1024, device=device, dtype=dtype)
    a, b = torch.randn(64, 1024, device=device) * 0.02, torch.randn(512, 64, device=device) * 0.1
    dropped, kept = draw_dropped(x, probability)
    if not abs(dropped.double().mean() - probability) < 1e-3:  # 12 standard errors
        raise TooFar(f"dropout of {probability} drops {float(dropped.double().mean())}")
    leaves = [tensor.requires_grad_() for tensor in (x, a, b)]
    with torch.autocast(device.type, dtype):
        found = LoraLinear.apply(*leaves, dropped, 2 / kept, base, False)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    update = exact[0].masked_fill(dropped, 0) @ exact[1].T @ exact[2].T
    expected = exact[0] @ weight_of(base, torch.float64).T + 2 / kept * update
    direction = torch.randn_like(found)
    found.backward(direction)
    expected.backward(direction.double())
    pairs = [(found.detach(), expected.detach()), *((one.grad, other.grad) for one, other in zip(leaves, exact, strict=True))]
    return dict(zip(("output", "input", "A", "B"), [relative_error(*pair) for pair in pairs], strict=True))


def loss_errors(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Errors of the chunked loss in a type, and of its gradient."""
    hidden = torch.randn(1500, 256, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(4000, 256, device=device) * 0.1).to(dtype)
    targets = torch.randint(4000, (1500,), device=device)
    targets[:100] = -100
    loss = summed_nll(hidden, weight, targets)
    loss.backward()
    leaf = hidden.detach().double().requires_grad_()
    exact = cross_entropy(leaf @ weight.double().T, targets, reduction="sum")
    exact.backward()
    return {"loss": relative_error(loss.detach(), exact.detach()), "gradient": relative_error(hidden.grad, leaf.grad)}


def compare_with_float64(device: str) -> Iterator[dict]:
    """Relative errors of what the project computes in 16 bit on the device.

    Raises:
        TooFar: if one is above :data:`LARGEST_ERROR`.
    """
    where = find_device(device)
    torch.manual_seed(0)
    parts: dict[str, Callable[[], dict[str, float]]] = {
        "attention, 1024 tokens": lambda: attention_errors(1024, False, where),
        "attention, 1000 tokens": lambda: attention_errors(1000, False, where),
        "attention, documents": lambda: attention_errors(1000, True, where),
        "4-bit layer": lambda: nf4_errors(where),
        "norm": lambda: norm_errors(where),
        "LoRA layer": lambda: lora_errors(where),
        **{f"loss in {dtype_name(dtype)}": partial(loss_errors, dtype, where) for dtype in LOSS_TYPES},
    }
    too_far = []
    for name, part in parts.items():
        errors = part()
        yield {name: {key: float(f"{error:.2g}") for key, error in errors.items()}}
        too_far += [f"{name}, {key}: {error:.3g}" for key, error in errors.items() if not error <= LARGEST_ERROR]
    if too_far:
        raise TooFar(f"relative errors above {LARGEST_ERROR}: {'; '.join(too_far)}")


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


def compare_offloading(device: str, shape: str, tokens: int) -> Iterator[dict]:
    """Losses and gradients of two micro-steps whose layers' inputs go to the host, copied while the GPU computes, against those
    with the inputs on the GPU. Without its synchronization, a copy would bring other numbers.

    Raises:
        TooFar: if one differs.
        RuntimeError: by torch, if it has no deterministic kernel for an operation.
    """
    where = find_device(device)
    with deterministic_kernels():
        model = prepare_case(CASES["ours"], shape, "nf4", tokens, where, form="layer_inputs")
        ids = torch.randint(training_cases.SHAPES[shape]["vocab_size"], (1, tokens)).to(where)
        expected, again = (losses_and_gradients(model, ids) for _ in range(2))
        yield {"difference, inputs on the GPU, from one time to the next": largest_difference(again, expected)}
        offload_inputs(model)
        difference = max(largest_difference(losses_and_gradients(model, ids), expected) for _ in range(3))
    yield {"difference, inputs offloaded": difference}
    if difference:
        raise TooFar(f"losses or gradients with offloaded inputs differ by up to {difference:.3g}")


@contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Let torch choose kernels that give the same numbers each time, and fill new memory with NaN."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # torch asks for it
    torch.use_deterministic_algorithms(True)  # with warn_only, the attention would not be deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def losses_and_gradients(model, ids: torch.Tensor) -> list[torch.Tensor]:
    """The losses of two micro-steps, and the sums of their gradients."""
    torch.manual_seed(3)
    model.zero_grad()
    losses, dtype = [], compute_dtype(ids.device)
    for _ in range(MICRO_STEPS):
        with torch.autocast(ids.device.type, dtype, enabled=dtype is not torch.float32):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
    return losses + [weight.grad for weight in model.parameters() if weight.requires_grad]


def largest_difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference of two lists of tensors, element by element; infinite if one is not a number."""
    differences = torch.stack([(one.double() - other.double()).abs().max() for one, other in zip(found, expected, strict=True)])
    return float(differences.max().nan_to_num(nan=torch.inf))


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
