"""Runs functions on fake tensors, which have a shape and a type but no memory, and counts what they would hold.

Every storage counts from the operation that makes it until it is freed. Counted is what torch's allocator would hold. Not
counted: the CUDA context, workspaces inside kernels (cuBLAS, attention), fragmentation.

The fake device is a CPU, so operations take the CPU's path where torch has two; for a GPU, the trace replaces those that
matter (:func:`pretend_gpu`).
"""

import weakref
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from bitsandbytes.functional import quantize_4bit
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import Function
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from longqlora.modeling import norms
from longqlora.modeling.chunked_loss import CHUNK
from longqlora.training import lora_forward

WEIGHTS, CONSTANTS, ADAPTER, GRADIENTS = "weights", "quantization constants", "adapter", "gradients"
ACTIVATIONS, LAYER_INPUTS, LOSS, RECOMPUTATION = "activations", "layer inputs", "loss", "recomputation"
OPTIMIZER, CACHE, FORWARD = "optimizer", "cache", "forward pass"


@dataclass
class Peak:
    """The most bytes that were held during a phase, by part, and the operation that reached them, with the shape it makes."""

    parts: Counter = field(default_factory=Counter)
    operation: str = ""

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return self.parts.total()


class MemoryTrace(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, until they are freed.

    Attributes:
        part: to which new storages belong.
        phase: of the job, for which a peak of its own is kept.
        live: bytes that are held now, by part.
        peaks: by phase.
        host: bytes held on the host now; ``host_peak``: at most.
    """

    def __init__(self, part: str = WEIGHTS, phase: str = "loading"):
        super().__init__()
        self.part, self.phase = part, phase
        self.live: Counter = Counter()
        self.owners: dict[int, str] = {}  # the part of each storage
        self.peaks: dict[str, Peak] = {}
        self.host = self.host_peak = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        name = function.__name__.split(".")[0]
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor, name)
        if name == "gemm_4bit":  # inside, bitsandbytes unpacks the weight, except for some hundred tokens and fewer
            rows, columns = arguments[2]
            self.note_peak(f"{name} {[rows, columns]}", extra=rows * columns * arguments[0].element_size())
        return result

    def add(self, tensor: torch.Tensor, operation: str) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.owners or tensor.device.type == "meta":  # without memory, or on the host
            return
        num_bytes = allocated(storage)
        self.owners[storage._cdata] = self.part
        self.live[self.part] += num_bytes
        weakref.finalize(storage, self.remove, storage._cdata, num_bytes)
        self.note_peak(f"{operation} {list(tensor.shape)}")

    def remove(self, key: int, num_bytes: int) -> None:
        self.live[self.owners.pop(key)] -= num_bytes

    def move(self, tensor: torch.Tensor, part: str) -> None:
        """Count a tensor's storage as part of another part from now on."""
        storage = tensor.untyped_storage()
        self.live[self.owners[storage._cdata]] -= allocated(storage)
        self.live[part] += allocated(storage)
        self.owners[storage._cdata] = part

    def note_peak(self, operation: str, extra: int = 0) -> None:
        peak = self.peaks.setdefault(self.phase, Peak())
        if self.live.total() + extra > peak.total:
            self.peaks[self.phase] = Peak(self.live + Counter({self.part: extra}), operation)

    def enter(self, phase: str, part: str) -> None:
        """Begin a phase, whose new storages belong to ``part``."""
        self.phase, self.part = phase, part

    def keep_on_host(self, num_bytes: int) -> None:
        self.host += num_bytes
        self.host_peak = max(self.host, self.host_peak)

    def host_buffer(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replaces :func:`longqlora.training.offloading.host_buffer`: pinned memory, which torch allocates in powers of two, on
        ``meta``, as the fake device is a CPU itself."""
        buffer = torch.empty_like(tensor, device="meta")
        num_bytes = 1 << max(0, tensor.nbytes - 1).bit_length()
        self.keep_on_host(num_bytes)
        weakref.finalize(buffer.untyped_storage(), self.keep_on_host, -num_bytes)
        return buffer


def allocated(storage: torch.UntypedStorage) -> int:
    """Bytes that CUDA's allocator gives for a storage: multiples of 512."""
    return -(-storage.nbytes() // 512) * 512


class LossInChunks(Function):
    """Holds what torch's ``linear_cross_entropy`` holds on its device: the float32 logits of a chunk, and gradients.

    torch hides the logits in an operator, and on a CPU, which is the fake device, it copies a 16-bit output layer to float32.
    Gradients of float32 hidden states are computed in the forward pass, those of others in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.gradients = loss_gradients(ctx, hidden, weight) if hidden.dtype is torch.float32 else None
        logits = torch.empty(CHUNK, len(weight), dtype=torch.float32)
        return logits.new_empty(())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        return ctx.gradients or loss_gradients(ctx, *ctx.saved_tensors)


def loss_gradients(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> tuple:
    """The gradients that are needed of both tensors; that of the weight is added up from a float32 one of each chunk."""
    chunk = [torch.empty(CHUNK, len(weight), dtype=torch.float32)]  # its logits
    if ctx.needs_input_grad[1]:
        chunk.append(torch.empty_like(weight, dtype=torch.float32))
    return tuple(
        torch.empty_like(x) if needed else None for x, needed in zip((hidden, weight), ctx.needs_input_grad, strict=True)
    )


def fake_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Replaces :func:`longqlora.modeling.chunked_loss.summed_nll`."""
    return LossInChunks.apply(hidden, weight)


class FusedNorm(Function):
    """What torch's kernel for an RMSNorm makes and keeps, by operations that read and write as much."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, torch.empty(hidden.shape[:-1], dtype=torch.float32))
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        hidden, weight, _ = ctx.saved_tensors
        return gradients[0] + hidden, torch.empty_like(weight) if ctx.needs_input_grad[1] else None


def dequantized(layer: Any) -> torch.Tensor:
    """A weight as peft's DoRA takes its norm: one in 4 bit is dequantized."""
    state: Any = getattr(layer.weight, "quant_state", None)
    return torch.empty(state.shape, dtype=state.dtype) if state else layer.weight


@contextmanager
def pretend_gpu(compute_dtype: torch.dtype):
    """Let a CPU take the path of a GPU that computes in ``compute_dtype``, where the two differ in memory."""
    is_enabled = torch.is_autocast_enabled

    def native_dropout(x, p=0.5, training=True, inplace=False):
        return torch.native_dropout(x, p, True)[0] if training and p else x

    replaced = [
        (torch, "is_autocast_enabled", lambda device="cpu": is_enabled(device)),  # without a device, peft means CUDA
        (torch.nn.functional, "dropout", native_dropout),  # a CPU saves its mask in the type of the input
        (lora_forward, "draw_dropped", lambda x, p: (torch.zeros(x.shape, dtype=torch.bool), 1 - p)),
        (norms, "has_kernel", lambda hidden: True),
        (torch.nn.functional, "rms_norm", lambda hidden, shape, weight, eps: FusedNorm.apply(hidden, weight)),
    ]
    with ExitStack() as stack:
        for owner, name, replacement in replaced:
            stack.enter_context(patch.object(owner, name, replacement))
        yield


def two_documents(begins: torch.Tensor) -> list[list[int]]:
    """Replaces :func:`longqlora.modeling.attention.document_lengths`: a third of the window, and the rest. More documents take
    as much memory, and one document or several equal ones less, because their attention can be computed in one piece."""
    n = begins.shape[1] + 1
    return [[n // 3, n - n // 3] for _ in begins]


@contextmanager
def fake_tensors(trace: MemoryTrace, *, documents: bool = False):
    """Let new tensors be fake, and leave out what needs their values.

    Args:
        trace: counts what is kept on the host.
        documents: whether several documents share a window, if position ids are given; see :func:`two_documents`.
    """
    with _disable_current_modes():  # keeps its table, which fake numbers would not give
        quantize_4bit(torch.ones(1, 64), compress_statistics=True, quant_type="nf4")
    replaced = [
        ("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: position_ids if documents else None),
        ("longqlora.modeling.attention.document_lengths", two_documents),
        ("longqlora.training.offloading.host_buffer", trace.host_buffer),
        ("longqlora.modeling.chunked_loss.summed_nll", fake_loss),
        ("peft.tuners.lora.dora.dequantize_module_weight", dequantized),
        # peft moves new weights to where they are already
        ("torch.nn.Module.to", lambda module, *arguments, **options: module),
    ]
    with ExitStack() as stack:
        for name, replacement in replaced:
            stack.enter_context(patch(name, replacement))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def label_weights(trace: MemoryTrace, model: torch.nn.Module) -> None:
    """Count the constants of quantized weights, and the weights of an adapter, as parts of their own."""
    for name, weight in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            trace.move(weight, ADAPTER)
        elif state := getattr(weight, "quant_state", None):
            trace.move(state.absmax, CONSTANTS)
            trace.move(state.state2.absmax, CONSTANTS)


@contextmanager
def counted_as(trace: MemoryTrace, part: str, owner: type, method: str):
    """Count what a method makes as part of ``part``."""
    original = getattr(owner, method)

    def counted(*arguments, **options):
        former, trace.part = trace.part, part
        try:
            return original(*arguments, **options)
        finally:
            trace.part = former

    with patch.object(owner, method, counted):
        yield
