"""Norms by torch's kernel: the same results and gradients as transformers' norms."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from longqlora.config.settings import TrainingSettings
from longqlora.modeling import norms
from longqlora.modeling.norms import use_fused_norms
from longqlora.training.adapters import BaseDtypes, add_adapter

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 97,
}


@pytest.fixture(autouse=True)
def with_a_kernel(monkeypatch):
    """torch's function, which has a kernel of its own on a GPU only."""
    monkeypatch.setattr(norms, "has_kernel", lambda hidden: True)


def model_of(config: type, dtype: torch.dtype):
    """A small model whose norms have weights that are not 1."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SIZES)).to(dtype)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, mean=1)
    return model


def outputs_and_gradients(model, dtype: torch.dtype) -> list[torch.Tensor]:
    """Logits, and gradients of all weights."""
    model.zero_grad()
    ids = torch.arange(40).reshape(2, 20)
    with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
        logits = model(input_ids=ids).logits
    logits.float().square().mean().backward()
    return [logits.detach(), *(weight.grad for weight in model.parameters())]


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config])
def test_results_and_gradients_are_those_of_transformers(config):
    model = model_of(config, torch.float64)
    expected = outputs_and_gradients(model, torch.float64)
    used = count_uses(model)
    for one, other in zip(outputs_and_gradients(model, torch.float64), expected, strict=True):
        assert (one - other).norm() < 1e-6 * other.norm()  # transformers computes its norms in float32
    assert len(used) == (2 if config is LlamaConfig else 4) * 2 + 1


def count_uses(model) -> list[torch.Size]:
    """Use fused norms; a list that grows by the shape of the input at each use."""
    used, rms_norm = [], torch.nn.functional.rms_norm
    use_fused_norms(model)

    class Counted(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is rms_norm:
                used.append(args[0].shape)
            return function(*args, **kwargs or {})

    forward = model.forward

    def counted(*args, **kwargs):
        with Counted():
            return forward(*args, **kwargs)

    model.forward = counted
    return used


def test_under_autocast_a_norm_stays_in_16_bit():
    """autocast computes torch's function in float32, and returns that."""
    norm = model_of(LlamaConfig, torch.bfloat16).model.norm
    hidden = torch.randn(2, 20, 32, dtype=torch.bfloat16)
    expected = norm(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        found = norms.fused(norm)(hidden)
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-2)


def test_a_weight_of_another_type_leaves_the_norm_to_transformers():
    norm = model_of(LlamaConfig, torch.float32).model.norm
    hidden = torch.randn(2, 20, 32, dtype=torch.bfloat16)
    assert torch.equal(norms.fused(norm)(hidden), norm(hidden))


def test_a_copy_that_is_trained_in_full_is_called_with_its_hooks():
    """Where layers compute in another type than the residual stream, a hook casts the output of their norms."""
    settings, dtypes = TrainingSettings(rank=4, modules_to_save=["norm"]), BaseDtypes(torch.float32, torch.float16)
    model = add_adapter(model_of(LlamaConfig, torch.float32), settings, base=dtypes)
    use_fused_norms(model)
    for layer in model.get_decoder().layers:
        assert layer.input_layernorm(torch.randn(2, 20, 32)).dtype is torch.float16
