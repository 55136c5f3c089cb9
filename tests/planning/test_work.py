"""What a device has to do: counted operations and bytes, compared with those that torch runs."""

import importlib

import pytest
import torch
from planned_models import CPU, SMALL, training
from torch.utils.flop_counter import FlopCounterMode, addmm_flop, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoModelForCausalLM, LlamaConfig

from longqlora.evaluation import token_losses
from longqlora.modeling.attention import register_shifted_sparse_attention
from longqlora.modeling.chunked_loss import use_chunked_loss
from longqlora.planning.work import TRAFFIC, forward_pass, micro_step, shape_of, trained_weights
from longqlora.training.activations import keep_activations
from longqlora.training.adapters import add_adapter

aten = torch.ops.aten


def count_flops(run) -> tuple[int, int]:
    """Operations of matrix products and of attention while a function runs; half of attention's is not causal."""

    def forward(query, key, value, *args, out_shape=None, **kwargs):
        return sdpa_flop_count(query, key, value)

    def backward(gradient, query, key, value, *args, out_shape=None, **kwargs):
        return sdpa_backward_flop_count(gradient, query, key, value)

    kernels = {  # in place and of a CPU, which the counter does not know
        aten.addmm_: lambda *shapes, **keywords: addmm_flop(*shapes),
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    attention = sum(count for kernel, count in counts.items() if "attention" in str(kernel))
    return sum(counts.values()) - attention, attention // 2


@pytest.mark.parametrize("form", ["all", "linear_outputs", "layer_inputs"])
@pytest.mark.parametrize("attention", ["full", "shifted_sparse"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_operations_of_a_training_step_are_those_that_torch_counts(method, attention, form):
    tokens, group, settings = 512, 128 if attention == "shifted_sparse" else 512, training(method=method, rank=16)
    name = register_shifted_sparse_attention(0.25, tokens) if attention == "shifted_sparse" else "sdpa"
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL), attn_implementation=name)  # the counter misses a fused loss
    if method == "lora":
        model = add_adapter(model, settings, base=None)
    keep_activations(model, form)
    ids = torch.arange(tokens)[None] % 512
    products, in_attention = count_flops(lambda: model.train()(input_ids=ids, labels=ids).loss.backward())
    if form == "layer_inputs" and method == "full":  # without tiles, the recomputation ends before the layer's last product
        products += 2 * tokens * SMALL["num_hidden_layers"] * SMALL["intermediate_size"] * SMALL["hidden_size"]
    work = micro_step(shape_of(SMALL), tokens, group, settings, CPU, form)
    assert work.products == pytest.approx(products, rel=0.05)
    assert work.attention == pytest.approx(in_attention, rel=0.05)


def test_operations_of_an_evaluation_are_those_that_torch_counts():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL), attn_implementation="sdpa").eval()
    ids = torch.arange(2 * 513).reshape(2, 513) % 512
    products, in_attention = count_flops(lambda: token_losses.nll_of_batch(model, ids))
    work = forward_pass(shape_of(SMALL), 512, "float32", CPU, rows=2)
    assert work.products == pytest.approx(products, rel=0.01)
    assert work.attention == pytest.approx(in_attention, rel=0.01)


@pytest.fixture
def traffic(root, monkeypatch):
    """The benchmark that counts bytes."""
    monkeypatch.syspath_prepend(root / "benchmarks")
    return importlib.import_module("traffic")


@pytest.mark.parametrize("form", ["all", "layer_inputs"])
def test_traffic_of_a_layer_on_a_cpu_is_what_its_operations_move(form, traffic):
    tokens, counted = 1024, []
    for layers in (1, 2):
        config = LlamaConfig(**(SMALL | {"num_hidden_layers": layers}))
        attention = register_shifted_sparse_attention(0.25, tokens)
        model = use_chunked_loss(AutoModelForCausalLM.from_config(config, attn_implementation=attention))
        model = add_adapter(model, training(rank=16), base=None)
        keep_activations(model, form)
        ids = torch.arange(tokens)[None] % 512
        with traffic.Traffic() as moved:
            model.train()(input_ids=ids, labels=ids).loss.backward()
        counted.append(moved.by_operation.total())
    forward, backward, _ = TRAFFIC["float32"]
    expected = tokens * shape_of(SMALL).layer_elements * (forward * (2 if form == "layer_inputs" else 1) + backward)
    assert counted[1] - counted[0] == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("form", ["all", "layer_inputs"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_traffic_of_a_layer_on_a_gpu_is_what_its_traced_operations_move(dtype, form, traffic):
    forward, backward, _ = TRAFFIC[dtype]
    expected = forward * (2 if form == "layer_inputs" else 1) + backward
    found = traffic.traffic_of_layer("7b", 8192, form, dtype).total() / (8192 * shape_of(traffic.SHAPES["7b"]).layer_elements)
    assert found == pytest.approx(expected, rel=0.05)


def test_a_micro_step_of_7b_moves_less_than_700_gb(traffic):
    layer = traffic.traffic_of_layer("7b", 8192, "layer_inputs", "bfloat16")
    assert 32 * layer.total() < 700e9


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rank": 8, "dora": True},
        {"target_modules": ["q_proj", "v_proj"]},
        {"modules_to_save": ["embed_tokens", "norm"]},
        {"method": "full"},
    ],
)
def test_trained_weights_are_those_of_the_real_model(changes):
    settings = training(**{"method": "lora", **changes})
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    if settings.method == "lora":
        model = add_adapter(model, settings, base=None)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert trained_weights(shape_of(SMALL), settings) == trained


def test_a_model_without_a_size_is_an_error():
    with pytest.raises(ValueError, match=r"config\.json has no vocab_size"):
        shape_of({key: value for key, value in SMALL.items() if key != "vocab_size"})


def test_mpt_has_its_published_number_of_weights():
    assert shape_of({"d_model": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 50432}).num_parameters == pytest.approx(
        6.65e9, rel=0.01
    )
