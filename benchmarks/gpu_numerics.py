"""Cases of the GPU check that compare numbers: what the project computes in 16 bit with float64, and steps whose layers' inputs
are offloaded with those where they are not.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import training_cases  # first: it lets longqlora be imported where something is missing
from torch.nn.functional import cross_entropy, rms_norm
from training_cases import CASES, prepare_case
from transformers.models.llama import modeling_llama

from longqlora.modeling.attention import shifted_sparse_attention
from longqlora.modeling.chunked_loss import summed_nll
from longqlora.modeling.devices import compute_dtype, dtype_name, find_device, weight_dtype
from longqlora.modeling.norms import fused
from longqlora.publishing.merging import nf4_round_trip
from longqlora.training.lora_forward import LoraLinear, draw_dropped, weight_of
from longqlora.training.offloading import offload_inputs

LARGEST_ERROR = 0.02  # of a 16-bit result against float64, relative to the norm
LOSS_TYPES = (torch.bfloat16, torch.float16, torch.float32)
MICRO_STEPS = 2  # of a step, so that gradients are there during the second one, as in a training and in the trace


class TooFar(ArithmeticError):
    """A result that differs from the one in float64 by more than rounding."""


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


# Offloaded inputs


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
