"""MLPs in tiles: the same results and gradients, and with checkpointing no more work."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from longqlora.config.settings import TrainingSettings
from longqlora.modeling.chunked_loss import use_chunked_loss
from longqlora.modeling.recomputation import recompute_all
from longqlora.modeling.tiled_mlp import tile_mlps
from longqlora.training.adapters import add_adapter

TOKENS, TILE = 100, 32  # the last tile is shorter
LAYERS = 3


def train_step(*, tile: int | None, checkpointing: bool, dropout: float = 0, dtype=torch.float64, method: str = "lora"):
    """Loss, gradients by name, and the number of tokens for which an MLP computed, in one step of a small model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4, vocab_size=97,
        max_position_embeddings=128,
    )  # fmt: skip
    model = use_chunked_loss(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype))
    if method == "lora":
        model = add_adapter(model, TrainingSettings(rank=4, dropout=dropout), base=None, trained=dtype)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    tokens = count_tokens(model)
    if tile:
        tile_mlps(model, tile)
    if checkpointing:
        options = {"use_reentrant": False, "context_fn": recompute_all}
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    ids = torch.arange(2 * TOKENS).reshape(2, TOKENS) % 97
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32):
        loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss, {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}, sum(tokens)


def count_tokens(model) -> list[int]:
    """A list that grows by the number of tokens at each call of an MLP."""
    tokens: list[int] = []
    for layer in model.get_decoder().layers:
        layer.mlp.gate_proj.register_forward_pre_hook(lambda module, inputs: tokens.append(inputs[0].shape[1]))
    return tokens


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_loss_and_gradients_are_those_of_the_whole_window(method, checkpointing):
    loss, gradients, _ = train_step(tile=None, checkpointing=checkpointing, method=method)
    in_tiles, gradients_in_tiles, _ = train_step(tile=TILE, checkpointing=checkpointing, method=method)
    torch.testing.assert_close(in_tiles, loss, rtol=1e-12, atol=0)
    assert gradients.keys() == gradients_in_tiles.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_in_tiles[name], gradient, rtol=1e-10, atol=1e-14)


def test_gradients_under_autocast_differ_by_rounding_alone():
    _, gradients, _ = train_step(tile=None, checkpointing=True, dtype=torch.float32)
    _, in_tiles, _ = train_step(tile=TILE, checkpointing=True, dtype=torch.float32)
    assert all(gradient.dtype is torch.float32 for gradient in in_tiles.values())
    for name, gradient in gradients.items():
        assert (in_tiles[name] - gradient).norm() < 2e-2 * gradient.norm(), name


def test_with_checkpointing_nothing_is_computed_more_often():
    _, _, whole = train_step(tile=None, checkpointing=True)
    _, _, in_tiles = train_step(tile=TILE, checkpointing=True)
    assert in_tiles == whole == 2 * LAYERS * TOKENS  # forward, and once more in the backward pass


@pytest.mark.parametrize("tile", [None, TILE])
def test_no_layer_computes_its_last_product_again(tile, monkeypatch):
    """No gradient needs it. The others are computed again: in tiles too, where no node of the MLP is left out."""
    computed: list[int] = []
    forward = torch.nn.Linear.forward

    def count(layer, x):
        computed.append(layer.in_features)
        return forward(layer, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", count)
    train_step(tile=tile, checkpointing=True)
    tiles = -(-TOKENS // tile) if tile else 1
    assert computed.count(64) == LAYERS * tiles  # of down_proj
    assert computed.count(32) == LAYERS * 2 * (4 + 2 * tiles)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_backward_pass_drops_what_the_forward_pass_dropped(checkpointing):
    """With another mask in the backward pass, two kinds of recomputation would give two gradients."""
    loss, gradients, _ = train_step(tile=TILE, checkpointing=checkpointing, dropout=0.5)
    other_loss, other, _ = train_step(tile=TILE, checkpointing=not checkpointing, dropout=0.5)
    torch.testing.assert_close(loss, other_loss, rtol=1e-12, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-10, atol=1e-14)


def test_dropout_has_the_gradient_of_its_loss():
    """A finite difference of the loss with the same mask, along the gradient of an adapter's weight."""
    torch.manual_seed(0)
    mlp = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 8)).double()
    layer = torch.nn.Module()
    layer.mlp, layer.input_layernorm, layer.post_attention_layernorm = mlp, torch.nn.Identity(), torch.nn.Identity()
    decoder = torch.nn.Module()
    decoder.layers = [layer]
    model = torch.nn.Module()
    model.get_decoder = lambda: decoder
    tile_mlps(model, tile=4)
    hidden = torch.randn(1, 10, 8, dtype=torch.float64, requires_grad=True)

    def loss(shift: float, weight=mlp[0].weight) -> torch.Tensor:
        torch.manual_seed(3)
        with torch.no_grad():
            weight += shift * direction
        result = (mlp(hidden) ** 2).sum()
        with torch.no_grad():
            weight -= shift * direction
        return result

    direction = torch.zeros_like(mlp[0].weight)
    loss(0).backward()
    direction, gradient = mlp[0].weight.grad.clone(), mlp[0].weight.grad
    difference = (loss(1e-6) - loss(-1e-6)) / 2e-6
    torch.testing.assert_close(difference.detach(), (gradient * direction).sum(), rtol=1e-5, atol=0)


def test_a_window_of_one_tile_is_not_tiled():
    _, _, tokens = train_step(tile=TOKENS, checkpointing=False)
    assert tokens == LAYERS * TOKENS


@pytest.mark.parametrize("norm", ["input_layernorm", "post_attention_layernorm"])
def test_a_norm_in_tiles_keeps_its_input_alone(norm):
    def elements_saved(tile: int | None) -> int:
        saved: list[int] = []
        config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=97)
        model = AutoModelForCausalLM.from_config(config).model.train()
        if tile:
            tile_mlps(model_of(model), tile)
        hidden = torch.randn(1, TOKENS, 32, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
            getattr(model.layers[0], norm)(hidden)
        return sum(size for size in saved if size == hidden.numel())

    assert elements_saved(tile=TILE) == TOKENS * 32 < elements_saved(tile=None)


def model_of(decoder) -> torch.nn.Module:
    """A model as :func:`tile_mlps` takes it."""
    model = torch.nn.Module()
    model.get_decoder = lambda: decoder
    return model
