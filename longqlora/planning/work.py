"""What a device has to do for a job, counted from a model's ``config.json`` and the settings alone: floating-point operations
of matrix products, those of attention, and bytes that operations element by element and dequantization move.

The shares of a card's rates (:mod:`longqlora.planning.cards`) that the jobs reach were measured on an H100
(benchmarks/RESULTS.md, "On a GPU"). A GPU works while Python prepares the next operations; where they are small, Python's time
decides.

Shapes: n tokens of a window, G tokens of a group of the shifted sparse attention.
"""

import math
from dataclasses import astuple, dataclass

from longqlora.config.settings import TrainingSettings
from longqlora.planning.cards import Card

# Measured on an H100: from the profile of a 7B step at 8192 tokens, and full against sparse attention at 32,768 tokens.
PRODUCTS_SHARE = 0.9  # of the rate of a large product, reached by the products of a model
ATTENTION_SHARE = 0.6  # of the same rate, reached by the fused kernel; causality leaves half of the operations
TRAFFIC_SHARE = 0.8  # of the bandwidth of a large copy, reached by operations element by element
PASS_SECONDS = 0.078 / 32  # Python's time for a pass through a layer: a token of a 7B answer takes 78 ms, in 32 layers

# Bytes that operations element by element move, by token, layer, and element of the inputs and outputs of the layer's linear
# layers: counted by benchmarks/traffic.py on the operations of a traced step, with dropout and sparse attention (a third less
# without dropout). For layers of 7B, 13B and Llama 3 8B it is the same within 3 %. An evaluation runs transformers' norms.
TRAFFIC = {  # by residual stream and autocast: a forward pass with adapter, a backward pass, a forward pass without adapter
    "bfloat16": (8, 13, 10),
    "float16": (11, 19, 10),  # with a float32 residual stream
    "float32 under autocast": (21, 8, 10),  # all weights are trained
    "float32": (25, 27, 12),
}
RECOMPUTED = {  # forward passes that the backward pass computes again: of the base's linear layers and attention; of the rest
    "all": (0, 0),
    "linear_outputs": (0, 1),
    "layer_inputs": (1, 1),
    "offloaded": (1, 1),
}
ACCUMULATION_TRAFFIC = 12  # bytes that adding to its gradient moves
BFLOAT16_ON_A_CPU = 1.8  # times the time of float32 (RESULTS.md, "Float32 or bfloat16 on a CPU"; attention measured likewise)
CACHE_PASSES = 3  # a new token's passes over the cache: it is read, and copied to be one token longer
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Shape:
    """What the cost of a model depends on.

    Attributes:
        layers: their number.
        width: of the hidden states.
        heads: width of all query heads together.
        keys: width of all key heads together.
        linears: inputs and outputs of each linear layer of a layer, by name.
        vocabulary: number of tokens.
        tied: whether the output layer shares its weight with the embeddings.
        stored: dtype of the weights in the checkpoint.
    """

    layers: int
    width: int
    heads: int
    keys: int
    linears: dict[str, tuple[int, int]]
    vocabulary: int
    tied: bool
    stored: str

    @property
    def layer_weights(self) -> int:
        """Weights in the linear layers of a layer."""
        return sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def layer_elements(self) -> int:
        """Inputs and outputs of the linear layers of a layer, for one token."""
        return sum(inputs + outputs for inputs, outputs in self.linears.values())

    @property
    def embeddings(self) -> int:
        """Weights of the embeddings, or of the output layer."""
        return self.vocabulary * self.width

    @property
    def norms(self) -> int:
        """Weights of the norms."""
        return (2 * self.layers + 1) * self.width

    @property
    def num_parameters(self) -> int:
        """All weights."""
        return self.layers * self.layer_weights + (1 if self.tied else 2) * self.embeddings + self.norms


def shape_of(model: dict) -> Shape:
    """Read a model's shape.

    Args:
        model: its ``config.json``: of LLaMA and its relatives, or of MPT.

    Raises:
        ValueError: if the file lacks a size; the message names it.
    """
    model = model.get("text_config") or model
    try:
        if "d_model" in model:  # MPT: one query, key and value layer, two layers in an MLP
            width, layers, heads, keys = model["d_model"], model["n_layers"], model["d_model"], model["d_model"]
            inner = width * model.get("expansion_ratio", 4)
            linears = {"Wqkv": (width, 3 * width), "out_proj": (width, width)}
            linears |= {"up_proj": (width, inner), "down_proj": (inner, width)}
        else:
            width, layers, inner = model["hidden_size"], model["num_hidden_layers"], model["intermediate_size"]
            head = model.get("head_dim") or width // model["num_attention_heads"]
            heads = head * model["num_attention_heads"]
            keys = head * (model.get("num_key_value_heads") or model["num_attention_heads"])
            linears = {"q_proj": (width, heads), "k_proj": (width, keys), "v_proj": (width, keys), "o_proj": (heads, width)}
            linears |= {"gate_proj": (width, inner), "up_proj": (width, inner), "down_proj": (inner, width)}
        vocabulary = model["vocab_size"]
    except KeyError as error:
        raise ValueError(f"config.json has no {error.args[0]}, from which time and disk space are estimated") from None
    tied = bool(model.get("tie_word_embeddings", "d_model" in model))
    stored = str(model.get("dtype") or model.get("torch_dtype") or "float32").removeprefix("torch.")
    return Shape(layers, width, heads, keys, linears, vocabulary, tied, stored)


def stored_bytes(shape: Shape) -> int:
    """Size of a model's weights on the disk."""
    return shape.num_parameters * ITEMSIZE.get(shape.stored, 2)


def adapted_linears(shape: Shape, settings: TrainingSettings) -> dict[str, tuple[int, int]]:
    """The linear layers of a layer that get an adapter: inputs and outputs by name."""
    if settings.target_modules == "all-linear":
        return shape.linears
    return {name: sizes for name, sizes in shape.linears.items() if name in settings.target_modules}


def adapter_weights(shape: Shape, settings: TrainingSettings) -> int:
    """Weights of the LoRA matrices, and of DoRA's magnitudes, in all layers."""
    sizes = adapted_linears(shape, settings).values()
    return shape.layers * sum(settings.rank * (inputs + outputs) + settings.dora * outputs for inputs, outputs in sizes)


def trained_weights(shape: Shape, settings: TrainingSettings) -> int:
    """Number of weights that a training changes."""
    if settings.method == "full":
        return shape.num_parameters
    kinds = {name.split(".")[-1] for name in settings.modules_to_save}
    saved = shape.embeddings * len(kinds & {"embed_tokens", "lm_head"})
    return adapter_weights(shape, settings) + saved + shape.norms * any(kind.endswith("norm") for kind in kinds)


@dataclass(frozen=True)
class Work:
    """What a device has to do.

    Attributes:
        products: floating-point operations of matrix products.
        attention: those of attention that causality leaves.
        traffic: bytes that all other operations move.
        passes: times that Python goes through a layer.
    """

    products: float = 0
    attention: float = 0
    traffic: float = 0
    passes: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> "Work":
        return Work(*(each * times for each in astuple(self)))

    def seconds(self, card: Card) -> float:
        """How long a card takes, whose rates are known."""
        assert card.matmul_rate
        assert card.bandwidth
        operations = self.products / PRODUCTS_SHARE + self.attention / ATTENTION_SHARE
        computing = operations / card.matmul_rate + self.traffic / (TRAFFIC_SHARE * card.bandwidth)
        return max(computing, self.passes * PASS_SECONDS)


def attention_flops(shape: Shape, tokens: int, group: int) -> float:
    """Operations of causal attention in a forward pass of a window: queries times keys, and shares times values. With several
    groups, the shifted half of the heads begins and ends with half a group."""
    pairs = tokens**2 if group >= tokens else tokens * group - group**2 / 4
    return shape.layers * 2 * pairs * shape.heads


def weight_traffic(precision: str, compute: str) -> float:
    """Bytes that are moved to read a weight for a product: a quantized one, and one of another dtype, is converted before."""
    if precision in ("nf4", "int8"):
        return {"nf4": 0.53, "int8": 1}[precision] + ITEMSIZE[compute]  # NF4: half a byte, and the constants of its block
    stored = ITEMSIZE[precision]
    return stored + (ITEMSIZE[compute] if precision != compute else 0)


def micro_step(shape: Shape, tokens: int, group: int, settings: TrainingSettings, card: Card, form: str) -> Work:
    """A forward and backward pass of a batch in training.

    A frozen weight costs two operations per token in a forward pass, and two for the gradient of its input; a trained one two
    more for its own gradient. Attention's backward pass takes 2.5 times the operations of its forward pass (FlashAttention).

    Args:
        shape: of the base model.
        tokens: n.
        group: G; with full attention n.
        settings: of the training.
        card: that it runs on.
        form: a key of :data:`RECOMPUTED`.
    """
    is_full, base_again, again = settings.method == "full", *RECOMPUTED[form]
    residual = "float32 under autocast" if is_full and card.compute != "float32" else card.compute
    precision = {"qlora": "nf4", "lora": card.compute, "full": "float32"}[settings.method]
    last = 0 if is_full else math.prod(shape.linears.get("down_proj", (0, 0)))  # whose product is not computed again
    base = shape.layers * (shape.layer_weights * (4 + 2 * base_again + 2 * is_full) - last * 2 * base_again)
    adapter = 0 if is_full else adapter_weights(shape, settings) * (6 + again + base_again)  # A again, and B with the base
    # in 16 bit the loss computes its logits twice; in float32 it computes the gradient along with them
    head = shape.embeddings * (4 + 2 * (card.compute != "float32") + 2 * is_full)
    forward, backward, _ = (shape.layers * shape.layer_elements * each for each in TRAFFIC[residual])
    windows = Work(
        products=tokens * (base + adapter + head),
        attention=attention_flops(shape, tokens, group) * (3.5 + base_again),
        traffic=tokens * (forward * (1 + again) + backward),
    )
    read = shape.layers * shape.layer_weights * weight_traffic(precision, card.compute) * (2 + base_again)
    gradients = trained_weights(shape, settings) * ACCUMULATION_TRAFFIC
    once = Work(traffic=read + gradients, passes=shape.layers * (2 + again))
    return windows * (settings.batch_size / settings.sequence_parallel) + once


def forward_pass(
    shape: Shape,
    tokens: int,
    precision: str,
    card: Card,
    *,
    rows: int = 1,
    before: int = 0,
    scored: int | None = None,
    group: int | None = None,
    adapter: TrainingSettings | None = None,
) -> Work:
    """A forward pass without gradients.

    Args:
        shape: of the model.
        tokens: n, of each row.
        precision: of the weights.
        card: that it runs on.
        rows: of the batch.
        before: tokens of each row that are in a cache of keys and values, and are attended to.
        scored: tokens of each row that logits are computed for; None: all.
        group: G; None: full attention.
        adapter: settings of an adapter that is not merged.
    """
    weights = 0 if adapter is None else adapter_weights(shape, adapter)
    per_token = shape.layers * shape.layer_weights + weights
    head = shape.embeddings * (tokens if scored is None else scored)
    cached = rows * before * 2 * shape.layers * shape.keys * ITEMSIZE[card.compute]
    attention = attention_flops(shape, tokens, group or tokens) + shape.layers * 4 * tokens * before * shape.heads
    read = (per_token - weights) * weight_traffic(precision, card.compute) + shape.embeddings * ITEMSIZE[card.compute]
    elements = rows * tokens * shape.layers * shape.layer_elements * TRAFFIC[card.compute][2 if adapter is None else 0]
    work = Work(
        products=rows * 2 * (tokens * per_token + head),
        attention=rows * attention,
        traffic=elements + read + CACHE_PASSES * cached,
        passes=shape.layers,
    )
    return work * BFLOAT16_ON_A_CPU if card.device == "cpu" and precision in ("bfloat16", "float16") else work
