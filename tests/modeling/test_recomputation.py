"""What checkpointing computes again: the same step, and with outputs that are kept no product made twice."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from longqlora.config.settings import TrainingSettings
from longqlora.modeling.attention import register_shifted_sparse_attention
from longqlora.modeling.chunked_loss import use_chunked_loss
from longqlora.modeling.recomputation import BLOCK, Blocks, keep_and_reuse
from longqlora.training.activations import keep_activations
from longqlora.training.adapters import add_adapter

WIDTH, INNER, RANK, LAYERS, TOKENS = 64, 128, 4, 3, 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=4, vocab_size=97,
        max_position_embeddings=128,
    )  # fmt: skip
    path = str(tmp_path_factory.mktemp("base"))
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


class CountedProducts(TorchDispatchMode):
    """Counts 4-bit products, fused attentions, and the products with a matrix as large as a weight of the base."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        is_large = name == "aten::mm" and min(args[1].shape) >= WIDTH
        if is_large or "gemm_4bit" in name or (name.startswith("aten::_scaled_dot_product") and "backward" not in name):
            self.counts[name.split("::")[1].removesuffix("_for_cpu")] += 1
        return func(*args, **kwargs or {})


def train_step(folder: str, form: str, *, method="lora", dtype=torch.float64, dropout=0.0, attention="sdpa", **settings):
    """Loss, gradients by name and counted operations of a step."""
    quantization = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}
    options = quantization if method == "qlora" else {}
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention, **options)
    model = use_chunked_loss(base)
    if method != "full":
        torch.manual_seed(1)
        model = add_adapter(model, TrainingSettings(rank=RANK, dropout=dropout, **settings), base=None, trained=dtype)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    keep_activations(model, form)
    ids = torch.arange(2 * TOKENS).reshape(2, TOKENS) % 97
    torch.manual_seed(2)
    with CountedProducts() as counted:
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    return loss.detach(), gradients, counted.counts


@pytest.mark.parametrize("form", ["layer_inputs", "linear_outputs"])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"dropout": 0.3},
        {"method": "full"},
        {"dora": True},
        {"modules_to_save": ["norm", "q_proj"], "target_modules": ["v_proj", "down_proj"]},
    ],
    ids=["adapter", "dropout", "all weights", "DoRA", "modules trained in full"],
)
def test_loss_and_gradients_are_those_of_the_plain_step(folder, form, case):
    case = {"attention": register_shifted_sparse_attention(0.25)} | case
    loss, gradients, _ = train_step(folder, "all", **case)
    found_loss, found, _ = train_step(folder, form, **case)
    torch.testing.assert_close(found_loss, loss, rtol=1e-12, atol=0)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.norm() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-14)


def test_a_4_bit_base_has_the_same_gradients_but_for_rounding(folder):
    options = {"method": "qlora", "dtype": torch.float32, "dropout": 0.3}
    loss, gradients, _ = train_step(folder, "all", **options)
    found_loss, found, _ = train_step(folder, "linear_outputs", **options)
    torch.testing.assert_close(found_loss, loss, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_no_product_of_a_4_bit_base_is_computed_twice(folder):
    options = {"method": "qlora", "dtype": torch.float32}
    counts = {form: train_step(folder, form, **options)[2] for form in ("all", "linear_outputs", "layer_inputs")}
    assert counts["all"]["gemm_4bit"] == counts["linear_outputs"]["gemm_4bit"] == 7 * LAYERS
    assert counts["layer_inputs"]["gemm_4bit"] == (7 + 6) * LAYERS  # not that of down_proj, which no gradient needs
    attention = "_scaled_dot_product_flash_attention"
    assert counts["all"][attention] == counts["linear_outputs"][attention] == LAYERS
    assert counts["layer_inputs"][attention] == 2 * LAYERS


@pytest.mark.parametrize("method", ["lora", "full"])
def test_no_product_of_a_16_bit_base_is_computed_twice(folder, method):
    counts = {form: train_step(folder, form, method=method)[2] for form in ("all", "linear_outputs", "layer_inputs")}
    assert counts["linear_outputs"] == counts["all"]
    assert counts["layer_inputs"]["mm"] > counts["all"]["mm"]


def test_another_pass_computes_what_the_first_one_has_used(folder):
    """A graph that is kept can be passed twice; the kept outputs are gone by then."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).train()
    keep_activations(model, "linear_outputs")
    loss = model(input_ids=torch.arange(20)[None], labels=torch.arange(20)[None]).loss
    weights = list(model.parameters())
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    for gradient, again in zip(first, torch.autograd.grad(loss, weights), strict=True):
        torch.testing.assert_close(again, gradient)


def test_small_outputs_lie_in_blocks_and_keep_their_values_and_strides():
    keep, _ = keep_and_reuse(Blocks())
    outputs = [
        torch.randn(3, 5),
        torch.randn(2, 7, 4, dtype=torch.float64).transpose(1, 2),
        torch.randn(1),
        torch.randn(BLOCK // 4),
    ]
    kept = [keep.keep(output) for output in outputs]
    for copy, output in zip(kept, outputs, strict=True):
        assert torch.equal(copy, output)
        assert copy.stride() == output.stride()
    small, large = kept[:-1], kept[-1]
    assert len({copy.untyped_storage().data_ptr() for copy in small}) == 1
    assert large.data_ptr() == outputs[-1].data_ptr()
