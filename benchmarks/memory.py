"""Peak GPU memory of a QLoRA training step, traced without a GPU.

    python benchmarks/memory.py                                                      # minutes; no GPU, no network, no data
    python benchmarks/memory.py --steps 7b/8192 --compute-type float16               # as on a V100
    python benchmarks/memory.py --steps 7b/32768 --forms current --attention sdpa

The step runs through the functions that train (``add_adapter``, the attention, the MLPs in tiles, the chunked loss, activation
checkpointing) on fake tensors, which have a shape and a type but no memory. Every storage counts from the operation that makes
it until it is freed. A step is the second micro-step of several (forward and backward), so gradients are there already.

Counted is what torch's allocator would hold. Not counted: the optimizer's paged state (a column of its own), the CUDA context,
workspaces inside kernels (cuBLAS, attention), fragmentation. The fake device is a CPU, so operations take the CPU's path where
torch has two; the trace replaces those that matter (:func:`pretend_gpu`). The chunked loss keeps its CPU path, which holds a
float32 copy of the output layer; the column "peak at" shows whether that decides the peak.
"""

import argparse
import gc
import os
import shlex
import sys
import weakref
from collections import Counter
from contextlib import ExitStack, contextmanager
from datetime import date
from unittest.mock import patch

import torch
import training_cases
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Linear4bit
from measuring import GIB
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from training_cases import ADAPTER, GROUP_RATIO, SHAPES, build_model

from longqlora.jobs.machine import versions
from longqlora.modeling.attention import register_shifted_sparse_attention
from longqlora.modeling.chunked_loss import use_chunked_loss
from longqlora.modeling.devices import dtype_name
from longqlora.modeling.tiled_mlp import tile_mlps
from longqlora.training.adapters import FLOAT32, BaseDtypes, add_adapter, base_dtypes

CPU = torch.device("cpu")
STEPS = ("7b/8192", "13b/12288", "7b/32768")
FORMS = {
    "float32": "embeddings, norms and output layer in float32, as peft prepares them",
    "current": "the dtypes of longqlora.training.adapters.base_dtypes",
    "offloaded": "the same, the layers' inputs in CPU memory until the backward pass",
}
PARTS = ("weights and adapter", "gradients", "saved by the forward pass", "backward pass")
COMPUTE_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class MemoryTrace(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, until they are freed, by the part of the step that made them."""

    def __init__(self):
        super().__init__()
        self.part, self.live, self.storages = PARTS[0], Counter(), set()
        self.peak, self.at_peak, self.operation = 0, Counter(), ""

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
        if storage._cdata in self.storages:
            return
        num_bytes = -(-storage.nbytes() // 512) * 512  # CUDA's allocator gives multiples
        self.storages.add(storage._cdata)
        self.live[self.part] += num_bytes
        weakref.finalize(storage, self.remove, storage._cdata, self.part, num_bytes)
        self.note_peak(f"{operation} {list(tensor.shape)}")

    def remove(self, key: int, part: str, num_bytes: int) -> None:
        self.storages.discard(key)
        self.live[part] -= num_bytes

    def note_peak(self, operation: str, extra: int = 0) -> None:
        held = self.live.total() + extra
        if held > self.peak:
            self.peak, self.at_peak, self.operation = held, self.live + Counter({self.part: extra}), operation


class KeptOnHost(saved_tensors_hooks):
    """Replaces torch's ``save_on_cpu``: a saved tensor leaves the device, and a new one is made when it is needed."""

    def __init__(self, **options):
        super().__init__(lambda tensor: (tensor.shape, tensor.dtype), lambda saved: torch.empty(saved[0], dtype=saved[1]))


def fake_quantized_layer(weight: torch.Tensor, compute_dtype: torch.dtype) -> Linear4bit:
    """:func:`training_cases.quantized_layer` of a fake weight ``[out, in]``, which the class of 4-bit weights does not take."""
    rows, columns = weight.shape
    with _disable_current_modes():
        layer = Linear4bit(columns, rows, bias=False, compute_dtype=compute_dtype, quant_type="nf4", device="meta")
    packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    packed = Parameter(packed, requires_grad=False)
    packed.quant_state, packed.quant_type, packed.compress_statistics = state, "nf4", True
    del layer.weight
    layer.weight = packed
    return layer


@contextmanager
def pretend_gpu(compute_dtype: torch.dtype):
    """Let a CPU take the path of a GPU that computes in ``compute_dtype``, where the two differ in memory."""
    is_enabled = torch.is_autocast_enabled

    def native_dropout(x, p=0.5, training=True, inplace=False):
        return torch.native_dropout(x, p, True)[0] if training and p else x

    replaced = [
        (training_cases, "compute_dtype", lambda device: compute_dtype),
        (training_cases, "weight_dtype", lambda device: compute_dtype),
        (torch, "is_autocast_enabled", lambda device="cpu": is_enabled(device)),  # without a device, peft means CUDA
        (torch.nn.functional, "dropout", native_dropout),  # a CPU saves its mask in the type of the input
    ]
    with ExitStack() as stack:
        for owner, name, replacement in replaced:
            stack.enter_context(patch.object(owner, name, replacement))
        yield


@contextmanager
def fake_tensors():
    """Let new tensors be fake, and leave out what needs their values."""
    quantize_4bit(
        torch.ones(1, 64), compress_statistics=True, quant_type="nf4"
    )  # keeps its table, which fake numbers would not give
    replaced = [
        ("training_cases.quantized_layer", fake_quantized_layer),
        ("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None),  # a window is one document
        ("transformers.modeling_utils.save_on_cpu", KeptOnHost),
        # peft moves new weights to where they are already
        ("torch.nn.Module.to", lambda module, *arguments, **options: module),
    ]
    with ExitStack() as stack:
        for name, replacement in replaced:
            stack.enter_context(patch(name, replacement))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def build_step(trace: MemoryTrace, shape: str, tokens: int, dtypes: BaseDtypes, *, attention: str, offload: bool):
    """The model of a step, with its adapter, ready to train."""
    name = register_shifted_sparse_attention(GROUP_RATIO, tokens) if attention == "shifted_sparse" else attention
    model = use_chunked_loss(build_model(shape, "nf4", tokens, CPU, name))
    model = add_adapter(model, ADAPTER, base=dtypes)
    tile_mlps(model)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False}, offload=offload)
    return model.train()


def take_micro_steps(trace: MemoryTrace, model, tokens: int, compute_dtype: torch.dtype) -> None:
    """Two forward and backward passes; the first leaves the gradients."""
    ids = torch.zeros(1, tokens, dtype=torch.long)
    count = torch.tensor(float(tokens))
    for forward, backward in (("gradients", "gradients"), ("saved by the forward pass", "backward pass")):
        trace.part = forward
        with torch.autocast("cpu", compute_dtype):
            loss = model(input_ids=ids, labels=ids, num_items_in_batch=count).loss
        trace.part = backward
        loss.backward()
        del loss


def trace_step(
    shape: str, tokens: int, dtypes: BaseDtypes, compute_dtype: torch.dtype, *, attention: str, offload: bool
) -> dict:
    """Trace a step.

    Args:
        shape: of ``training_cases.SHAPES``.
        dtypes: of the base.
        compute_dtype: of autocast.
        attention: ``shifted_sparse`` or ``sdpa``.
        offload: keep the layers' inputs in CPU memory.

    Returns:
        Bytes: ``peak``, ``parts`` (at the peak), ``adam_state``; ``operation``: at the peak, with the shape it makes.
    """
    gc.collect()  # cycles of a former step would be freed during this one
    with pretend_gpu(compute_dtype), fake_tensors(), MemoryTrace() as trace:
        model = build_step(trace, shape, tokens, dtypes, attention=attention, offload=offload)
        gc.collect()  # of loading, the largest 16-bit weight
        trace.peak = 0
        take_micro_steps(trace, model, tokens, compute_dtype)
        trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return {"peak": trace.peak, "parts": trace.at_peak, "operation": trace.operation, "adam_state": 2 * 4 * trainable}


def dtypes_of(form: str, compute_dtype: torch.dtype) -> BaseDtypes:
    """The dtypes of a base in a form, on a GPU that computes in ``compute_dtype``."""
    if form == "float32":
        return FLOAT32
    with patch("longqlora.training.adapters.compute_dtype", lambda device: compute_dtype):
        return base_dtypes(torch.device("cuda"))


def table_row(step: str, form: str, found: dict) -> str:
    parts = [f"{found['parts'][part] / GIB:.2f}" for part in PARTS]
    sizes = [f"**{found['peak'] / GIB:.2f}**", *parts, f"{found['adam_state'] / GIB:.2f}"]
    return f"| {' | '.join([step, form, *sizes, found['operation']])} |"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", default=STEPS, metavar="SHAPE/TOKENS", help=f"shapes: {', '.join(SHAPES)}")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help=str(FORMS))
    parser.add_argument("--compute-type", choices=COMPUTE_TYPES, default="bfloat16", help="float16: as on a V100")
    parser.add_argument("--attention", choices=["shifted_sparse", "sdpa"], default="shifted_sparse")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    compute_dtype = COMPUTE_TYPES[arguments.compute_type]
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    print(f"## Memory of a training step, traced, {date.today().isoformat()}\n")
    print(f"`{shlex.join([os.path.basename(sys.executable), *sys.argv])}`; {packages}. Sizes in GiB.\n")
    print(f"| step | base | peak | {' | '.join(PARTS)} | in addition: paged Adam state | peak at |")
    print(f"|:--|:--|{'--:|' * (len(PARTS) + 2)}:--|")
    for step in arguments.steps:
        shape, tokens = step.split("/")
        for form in arguments.forms:
            found = trace_step(
                shape, int(tokens), dtypes_of(form, compute_dtype), compute_dtype,
                attention=arguments.attention, offload=form == "offloaded",
            )  # fmt: skip
            dtypes = dtypes_of(form, compute_dtype)
            label = f"{dtype_name(dtypes.weights)}, layers {dtype_name(dtypes.layers)}" + (
                ", offloaded" if form == "offloaded" else ""
            )
            print(table_row(step, label, found), flush=True)


if __name__ == "__main__":
    main()
