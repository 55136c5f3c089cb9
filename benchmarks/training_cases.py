"""The training steps that are compared, and the evaluation of a window: shapes, attention, losses, models with random weights.

Shapes: b batch, n tokens of a window, h heads, d width of a head, G tokens of a group.
"""

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import MethodType

import stand_ins  # before longqlora
import torch
from measuring import GIB, MIB, best_seconds, held_memory, timed
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import CausalLMOutput

from longqlora.config.settings import RopeExtension, TrainingSettings
from longqlora.evaluation.token_losses import nll_of_batch
from longqlora.modeling.attention import register_shifted_sparse_attention
from longqlora.modeling.chunked_loss import use_chunked_loss
from longqlora.modeling.devices import compute_dtype, dtype_name, find_device, keep_freed_memory, weight_dtype
from longqlora.modeling.rope import extend_context
from longqlora.planning.fake_models import put_weights
from longqlora.planning.work import RECOMPUTED
from longqlora.training.activations import Form, keep_activations
from longqlora.training.adapters import FLOAT32, add_adapter, base_dtypes
from longqlora.training.heap import return_freed_memory


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
    "8b": llama(4096, 14336, 32, 32, context=8192, vocab_size=128256) | {"num_key_value_heads": 8},
}
GROUP_RATIO = 0.25
ADAPTER = TrainingSettings()  # the defaults are the paper's adapter: rank 64 on all linear layers
LEARNING_RATE, MAX_GRAD_NORM = 2e-4, 0.3


@dataclass(frozen=True)
class Case:
    """What distinguishes a case: its attention (``shifted_sparse``, ``sdpa``, ``published``), its loss (``chunked``, over the
    ``whole`` window, or ``plain``, as transformers does it; without training, ``scored`` as an evaluation does, or ``none``),
    the kind of its checkpointing, and in ours which activations are kept."""

    attention: str
    loss: str
    reentrant: bool = False
    form: Form = "layer_inputs"

    @property
    def is_ours(self) -> bool:
        """Whether it runs with the project's settings of memory as well (``longqlora.modeling.devices.keep_freed_memory``)."""
        return self.loss in ("chunked", "scored", "none")

    @property
    def is_training(self) -> bool:
        return self.loss in ("chunked", "whole", "plain")


CASES = {
    "ours": Case("shifted_sparse", "chunked"),
    "ours_full": Case("sdpa", "chunked"),
    "ours_linear_outputs": Case("shifted_sparse", "chunked", form="linear_outputs"),
    "ours_all": Case("shifted_sparse", "chunked", form="all"),
    "plain": Case("sdpa", "plain"),
    "published": Case("published", "whole", reentrant=True),
    "perplexity": Case("sdpa", "scored"),
    "forward": Case("sdpa", "none"),
}


# The published step


def published_mask(*, q_length: int, device, dtype=torch.float32, **request) -> torch.Tensor:
    """Causality of the whole window, to be added to scores: ``[1, 1, n, n]``, made once per forward, as transformers did."""
    return torch.full((q_length, q_length), torch.finfo(dtype).min, dtype=dtype, device=device).triu_(1)[None, None]


def published_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """S² attention as first published: the second half of the heads is rolled by half a group, so that the first G/2 tokens
    share a group with the last G/2, which they see although those are their future.

    Args:
        query, key, value: ``[b, h, n, d]``, n a multiple of G.
        attention_mask: ``[1, 1, n, n]``, see :func:`published_mask`.

    Returns:
        ``[b, n, h, d]``, None
    """
    batch, heads, tokens, width = query.shape
    group = int(tokens * GROUP_RATIO)
    if tokens % group:
        raise ValueError(f"{tokens} tokens are no multiple of the group of {group}")

    def roll_half(x, by):  # [b, n, h, d]
        straight, shifted = x.chunk(2, dim=2)
        return torch.cat([straight, shifted.roll(by, dims=1)], dim=2)

    def fold(x):
        x = roll_half(x.transpose(1, 2), -(group // 2))  # [b, n, h, d]
        return x.reshape(batch * tokens // group, group, heads, width).transpose(1, 2)  # [b · n / G, h, G, d]

    query, key, value = fold(query), fold(key), fold(value)
    scores = query @ key.transpose(2, 3) * (scaling or width**-0.5)  # [b · n / G, h, G, G]
    scores = scores + attention_mask[:, :, :group, :group]
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


# Models


def build_model(shape: str, precision: str, length: int, device: torch.device, attention: str):
    """A LLaMA with random weights, extended to ``length`` tokens if its own context is shorter.

    The model begins without storage and gets one weight after the other, quantized at once, so that at no time there is a
    16-bit copy of it.

    Args:
        precision: of the linear layers: ``nf4``, or ``auto``, as :func:`longqlora.modeling.loading.load_model` takes it.
    """
    config = LlamaConfig(**SHAPES[shape], use_cache=False, bos_token_id=1, eos_token_id=2)
    if length > config.max_position_embeddings:
        extend_context(config, RopeExtension(target_context=length))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    torch.manual_seed(1)

    def random_weight(shape: torch.Size) -> torch.Tensor:
        new = torch.empty(shape, dtype=weight_dtype(device), device=device)
        return new.normal_(std=0.02) if new.ndim == 2 else new.fill_(1)

    quantized = partial(quantized_layer, compute_dtype=compute_dtype(device)) if precision == "nf4" else None
    put_weights(model, random_weight, quantized)
    model.is_loaded_in_4bit = precision == "nf4"  # peft asks
    return model.requires_grad_(False)


def quantized_layer(weight: torch.Tensor, compute_dtype: torch.dtype):
    """A linear layer in NF4 with double quantization.

    Args:
        weight: ``[out, in]``
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    rows, columns = weight.shape
    layer = Linear4bit(columns, rows, bias=False, compute_dtype=compute_dtype, quant_type="nf4", device="meta")
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer).to(weight.device)
    return layer.requires_grad_(False)


def prepare_case(case: Case, shape: str, precision: str, length: int, device: torch.device, *, form: Form | None = None):
    """The model of a case, with its attention, loss, adapter and checkpointing, in another form if one is given."""
    attention = {
        "shifted_sparse": lambda: register_shifted_sparse_attention(GROUP_RATIO),
        "published": register_published_attention,
        "sdpa": lambda: "sdpa",
    }[case.attention]()
    model = build_model(shape, precision, length, device, attention)
    if not case.is_training:
        return model.eval()
    if case.loss != "plain":
        {"chunked": use_chunked_loss, "whole": use_whole_window_loss}[case.loss](model)
    torch.manual_seed(2)
    # ours trains in the dtypes of the device, the others in float32, as peft prepares a 4-bit base
    dtypes = base_dtypes(device) if case.is_ours else FLOAT32
    model = add_adapter(model, ADAPTER, base=dtypes if precision == "nf4" else None)
    if case.is_ours:
        keep_activations(model, form or case.form)
        return model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": case.reentrant})
    if case.reentrant:
        model.enable_input_require_grads()
    return model.train()


def training_step(
    model, ids: torch.Tensor, *, micro_steps: int = 1, paged: bool = True, returns_memory: bool = False
) -> Callable[[], float]:
    """A function that trains on a batch once and returns the loss.

    Args:
        ids: ``[b, n]``
        micro_steps: passes over the batch, forward and backward, whose gradients are added up before the optimizer's step.
        paged: on a GPU with bitsandbytes, keep the optimizer's state in paged memory.
        returns_memory: before and after the forward pass, as :class:`longqlora.training.trainer.ResumableTrainer` does.
    """
    weights, dtype = [weight for weight in model.parameters() if weight.requires_grad], compute_dtype(ids.device)
    if paged and ids.is_cuda and importlib.util.find_spec("bitsandbytes"):
        from bitsandbytes.optim import PagedAdamW32bit as AdamW
    else:
        from torch.optim import AdamW
    optimizer = AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)

    def step() -> float:
        torch.manual_seed(3)  # the dropout of all cases is the same
        for _ in range(micro_steps):
            if returns_memory:
                return_freed_memory(ids.device)
            with nullcontext() if dtype is torch.float32 else torch.autocast(ids.device.type, dtype):
                loss = model(input_ids=ids, labels=ids).loss
            if returns_memory:
                return_freed_memory(ids.device)
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
    return lambda: nll_of_batch(model, ids).mean().item()


def forward_step(model, ids: torch.Tensor) -> Callable[[], float]:
    """A function that runs transformers' plain forward pass over a window, all its logits in the type of the weights, and
    returns the loss of the last token.

    Args:
        ids: ``[1, n + 1]``
    """

    @torch.inference_mode()
    def step() -> float:
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return cross_entropy(logits[0, -1:].float(), ids[0, -1:]).item()

    return step


def step_of(case: Case, model, shape: str, length: int, device: torch.device, **options) -> Callable[[], float]:
    """A function that takes a step of a case on a window of random tokens and returns the loss.

    Args:
        model: of :func:`prepare_case`.
        options: of a step that trains, see :func:`training_step`.
    """
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(SHAPES[shape]["vocab_size"], (1, length + (not case.is_training)), generator=generator).to(device)
    if case.is_training:
        return training_step(model, ids, returns_memory=case.is_ours, **options)
    return {"scored": evaluation_step, "none": forward_step}[case.loss](model, ids)


# What a process sets up


def set_up_case(name: str, shape: str, precision: str, length: int, device_name: str) -> tuple[dict, Callable[[], dict]]:
    """Load the model of a case; return what it holds, and a function that takes a step and reports it."""
    case = CASES[name]
    device = find_device(device_name)
    if case.is_ours:
        keep_freed_memory(device)
    model = prepare_case(case, shape, precision, length, device)
    loaded = held_memory(device)
    step = step_of(case, model, shape, length, device)
    return {"loaded_bytes": loaded}, lambda: timed(step, device)


def matmul_rate(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second in a product of two square matrices."""
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    product = torch.empty_like(left)
    return 2 * size**3 / best_seconds(lambda: torch.mm(left, right, out=product), device.type == "cuda")


def set_up_ceiling(device_name: str) -> tuple[dict, None]:
    """What the machine can do: rate of a square matrix product in the autocast type, and bandwidth of a copy (read + write)."""
    device = find_device(device_name)
    on_gpu, dtype = device.type == "cuda", compute_dtype(device)
    size, num_bytes = (8192, GIB) if on_gpu else (2048, 256 * MIB)
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "matmul_size": size,
        "matmul_dtype": dtype_name(dtype),
        "matmul_flops": matmul_rate(size, dtype, device),
        "copy_bytes_per_second": 2 * num_bytes / best_seconds(lambda: target.copy_(source), on_gpu),
        "stand_ins": stand_ins.STOOD_IN_FOR,
    }, None


def step_flops(shape: str, name: str, tokens: int) -> float:
    """Floating-point operations of a step, what checkpointing computes again included.

    A weight that is frozen costs 2 operations per token forward, 2 if it is used again, and 2 for the gradient of its input;
    one of the adapter 2 more; the output layer is not used again, and a layer's last weight with reentrant checkpointing
    alone. Attention counts what causality leaves, its backward pass 2.5 times the forward one (FlashAttention).
    """
    config, case = SHAPES[shape], CASES[name]
    width, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    linear, head = layers * width * (4 * width + 3 * inner), config["vocab_size"] * width
    adapter = layers * ADAPTER.rank * (8 * width + 3 * (width + inner))
    seen = tokens if case.attention == "sdpa" else tokens * GROUP_RATIO
    attention = layers * 2 * tokens * seen * width
    if not case.is_training:
        return tokens * 2 * (linear + head) + attention
    again, adapter_again = RECOMPUTED[case.form]
    used_again = linear if case.reentrant else linear - layers * width * inner
    products = 4 * linear + 2 * again * used_again + (6 + again + adapter_again) * adapter + 4 * head
    return tokens * products + (3.5 + again) * attention
