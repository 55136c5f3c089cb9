"""The forward pass of LoRA layers: peft's result with less work, and dropout that drops as often as it should."""

import pytest
import torch
from conftest import tiny_llama
from peft.tuners.lora import LoraLayer

from longqlora.config.settings import TrainingSettings
from longqlora.training.adapters import add_adapter
from longqlora.training.lora_forward import STEPS, zero_some


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
def test_elements_are_dropped_as_often_as_asked_and_the_others_are_kept(size):
    x, threshold = torch.rand(size) + 1, round(0.05 * STEPS)
    torch.manual_seed(0)
    found = zero_some(x, threshold)
    dropped = found == 0
    assert torch.equal(found[~dropped], x[~dropped])
    assert abs(dropped.sum() - 0.05 * size) <= 5 * (size * 0.05) ** 0.5
    torch.manual_seed(0)
    assert torch.equal(zero_some(x, threshold), found)


def test_every_16_bits_of_a_word_are_random():
    torch.manual_seed(0)
    dropped = zero_some(torch.ones(400_000), STEPS // 2).view(-1, 4) == 0
    assert (dropped.float().mean(0) - 0.5).abs().max() < 0.01
    assert (dropped.float().T.corrcoef() - torch.eye(4)).abs().max() < 0.02
