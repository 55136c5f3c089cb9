"""LoRA layers: peft's result and gradients, what they keep and move, and dropout that drops as often as it should."""

import pytest
import torch
from conftest import tiny_llama
from peft.tuners.lora import LoraLayer
from torch.autograd.graph import saved_tensors_hooks

from longqlora.config.settings import TrainingSettings
from longqlora.training import lora_forward
from longqlora.training.adapters import add_adapter
from longqlora.training.lora_forward import STEPS, draw_dropped


def lora_layers(**settings) -> list:
    """The LoRA layers of a small model in training, with matrices B that are not zero."""
    model = add_adapter(tiny_llama().double(), TrainingSettings(rank=4, **settings), base=None, trained=torch.float64).train()
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    return layers


@pytest.mark.parametrize("settings", [{}, {"rslora": True}, {"dora": True}], ids=["LoRA", "rsLoRA", "DoRA"])
def test_the_result_and_its_gradients_are_those_of_peft(settings):
    for layer in lora_layers(dropout=0.0, **settings):
        x = torch.randn(2, 5, layer.in_features, dtype=torch.float64, requires_grad=True)
        weights = [x, *(weight for weight in layer.parameters() if weight.requires_grad)]
        expected, found = type(layer).forward(layer, x), layer(x)
        torch.testing.assert_close(found, expected)
        direction = torch.randn_like(expected)
        for gradient, reference in zip(
            torch.autograd.grad(found, weights, direction), torch.autograd.grad(expected, weights, direction), strict=True
        ):
            torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("settings", [{}, {"rslora": True}], ids=["LoRA", "rsLoRA"])
def test_with_dropout_the_gradients_are_those_of_peft_where_it_drops_the_same(settings, monkeypatch):
    dropped = torch.rand(2, 5, 200) < 0.3
    monkeypatch.setattr(lora_forward, "draw_dropped", lambda x, probability: (dropped[..., : x.shape[-1]], 1 - probability))
    for layer in lora_layers(dropout=0.3, **settings):
        x = torch.randn(2, 5, layer.in_features, dtype=torch.float64, requires_grad=True)
        weights = [x, *(weight for weight in layer.parameters() if weight.requires_grad)]
        kept = (~dropped[..., : layer.in_features]).double() / 0.7
        layer.lora_dropout["default"].forward = lambda x, kept=kept: x * kept
        expected, found = type(layer).forward(layer, x), layer(x)
        torch.testing.assert_close(found, expected)
        direction = torch.randn_like(expected)
        for gradient, reference in zip(
            torch.autograd.grad(found, weights, direction), torch.autograd.grad(expected, weights, direction), strict=True
        ):
            torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_result_and_gradients_differ_from_float64_by_rounding(dtype):
    for layer in lora_layers(dropout=0.0)[:7]:
        x = torch.randn(1, 64, layer.in_features, dtype=torch.float64, requires_grad=True)
        inputs = [x, *(weight for weight in layer.parameters() if weight.requires_grad)]
        direction = torch.randn(1, 64, layer.out_features, dtype=torch.float64)
        expected = [layer(x), *torch.autograd.grad(layer(x), inputs, direction)]
        layer.float()
        low = x.detach().to(dtype).requires_grad_()
        inputs[0] = low
        with torch.autocast("cpu", dtype):
            output = layer(low)
        found = [output, *torch.autograd.grad(output, inputs, direction.to(output.dtype))]
        assert [tensor.dtype for tensor in found] == [dtype, dtype, torch.float32, torch.float32]
        for one, other in zip(found, expected, strict=True):
            assert (one.double() - other).norm() < 4 * torch.finfo(dtype).eps * other.norm()


def test_of_dropout_a_byte_for_an_element_is_kept_and_no_copy_of_the_input():
    for layer in lora_layers(dropout=0.3):
        x = torch.randn(2, 50, layer.in_features, dtype=torch.float64, requires_grad=True)
        of_the_input = [tensor for tensor in saved_by(layer, x) if tensor.shape == x.shape]
        assert sorted(tensor.element_size() for tensor in of_the_input) == [1, 8]
        assert any(tensor.data_ptr() == x.data_ptr() for tensor in of_the_input)


def saved_by(layer, x: torch.Tensor) -> list[torch.Tensor]:
    """What the forward pass of a layer keeps for the backward pass."""
    saved: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    return saved


def test_sums_are_made_by_matrix_products():
    layer = lora_layers(dropout=0.0)[0]
    x = torch.randn(2, 50, layer.in_features, dtype=torch.float64, requires_grad=True)
    with torch.profiler.profile() as profile:
        layer(x).backward(torch.ones(2, 50, layer.out_features, dtype=torch.float64))
    names = [event.key for event in profile.key_averages()]
    assert "aten::addmm_" in names
    assert not {"aten::add", "aten::add_"} & set(names)


def test_an_input_without_gradient_has_none():
    layer = lora_layers(dropout=0.3)[0]
    x = torch.randn(2, 5, layer.in_features, dtype=torch.float64)
    layer(x).sum().backward()
    assert all(weight.grad.norm() > 0 for weight in layer.parameters() if weight.requires_grad)


def test_an_adapter_that_is_disabled_adds_nothing():
    layer = lora_layers(dropout=0.0)[0]
    x = torch.randn(2, 5, layer.in_features, dtype=torch.float64)
    assert not torch.equal(layer(x), layer.base_layer(x))
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_dropout_leaves_the_mean_of_the_result():
    layer = lora_layers(dropout=0.3)[0]
    x = torch.randn(1, 8, layer.in_features, dtype=torch.float64)
    torch.manual_seed(0)
    results = torch.stack([layer(x).detach() for _ in range(4000)])
    error = (results.mean(0) - layer.eval()(x)).abs() / (results.std(0) / 4000**0.5)
    assert results.std(0).min() > 0
    assert error.max() < 5  # standard errors


@pytest.mark.parametrize("size", [1, 7, 100_003])
def test_elements_are_dropped_as_often_as_asked(size):
    x = torch.rand(size)
    torch.manual_seed(0)
    dropped, kept = draw_dropped(x, 0.05)
    assert kept == pytest.approx(0.95, abs=1 / STEPS)
    assert abs(dropped.sum() - 0.05 * size) <= 5 * (size * 0.05) ** 0.5
    torch.manual_seed(0)
    assert torch.equal(draw_dropped(x, 0.05)[0], dropped)


def test_every_16_bits_of_a_word_are_random():
    torch.manual_seed(0)
    dropped = draw_dropped(torch.ones(400_000), 0.5)[0].view(-1, 4)
    assert (dropped.float().mean(0) - 0.5).abs().max() < 0.01
    assert (dropped.float().T.corrcoef() - torch.eye(4)).abs().max() < 0.02
