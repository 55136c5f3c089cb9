"""MLPs that compute a long window in tiles of tokens, so that the wide activations of a whole window are never in memory; and
norms without a fused kernel, whose float32 activations would be the largest of those that are left.

An MLP treats every token by itself, and so does a norm. Here their forward pass keeps its input alone, and their backward pass
computes one tile after another again (TiledMLP of Arctic Long Sequence Training, Bekman et al. 2025, arXiv 2506.13996). In a
layer with activation checkpointing, no MLP is computed more often than without tiles: the recomputation of the layer ends at
the MLP's input, which is the last tensor that is saved in it. Norms are computed once more.

Shapes: b batch, n tokens of a window, d width of the model.
"""

from typing import Any

import torch
from torch.autograd import Function
from transformers import PreTrainedModel

from longqlora.modeling.recomputation import inside

TILE = 4096
"""Tokens of a tile. A 4-bit weight is dequantized for each tile anew, which takes the longer the smaller the tiles are."""


class Saved(Function):
    """Returns its input and saves it for :class:`TiledMLP`, which comes next.

    A node of its own, because the recomputation of a checkpointed layer ends as soon as its last tensor is saved: here, before
    the MLP, while ``TiledMLP`` itself could save a tensor only after it.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0]


class TiledMLP(Function):
    """Applies a function of single tokens, tile by tile in both passes.

    Its input is the output of :class:`Saved`. Its further inputs are the weights that are trained, so that their gradients are
    results of this node: a process group averages each of them once.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, mlp, tile: int, *weights: torch.Tensor) -> torch.Tensor:
        ctx.saved, ctx.mlp, ctx.tile, ctx.weights = hidden.grad_fn, mlp, tile, weights
        device = hidden.device.type
        ctx.autocast = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
            "cache_enabled": False,  # copies that are cached here would have no gradient
        }
        ctx.random_state = random_state(hidden.device)
        with torch.autocast(**ctx.autocast):
            return torch.cat([mlp(part) for part in hidden.split(tile, dim=1)], dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        (hidden,) = ctx.saved.saved_tensors
        devices = [hidden.device] if hidden.device.type == "cuda" else []
        parts, totals = [], [torch.zeros_like(weight) for weight in ctx.weights]
        with torch.random.fork_rng(devices), torch.autocast(**ctx.autocast), inside(recomputation=True):
            set_random_state(hidden.device, ctx.random_state)
            for part, gradient in zip(hidden.split(ctx.tile, dim=1), gradients[0].split(ctx.tile, dim=1), strict=True):
                part = part.detach().requires_grad_()
                with torch.enable_grad():
                    output = ctx.mlp(part)
                of_part, *of_weights = torch.autograd.grad(output, [part, *ctx.weights], gradient)
                parts.append(of_part)
                for total, of_weight in zip(totals, of_weights, strict=True):
                    total += of_weight
        return torch.cat(parts, dim=1), None, None, *totals


def random_state(device: torch.device) -> list[torch.Tensor]:
    """The state of the generators that dropout on a device draws from."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_random_state(device: torch.device, state: list[torch.Tensor]) -> None:
    """Restore what :func:`random_state` returned."""
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


def tile_mlps(model: PreTrainedModel, tile: int = TILE) -> None:
    """Let the MLPs and norms of a model's layers train in tiles, in windows of more than ``tile`` tokens. Results and gradients
    are the same, but for rounding and what dropout drops.

    Args:
        model: of transformers, with its adapter if it has one.
        tile: tokens of a tile.
    """
    for layer in model.get_decoder().layers:
        for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
            part.forward = tiled(part, tile)


def tiled(part: torch.nn.Module, tile: int):
    """The forward pass of an MLP or a norm, ``[b, n, d] → [b, n, d]``, in tiles where gradients are computed."""
    forward = part.forward

    def forward_in_tiles(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[1] <= tile or not (torch.is_grad_enabled() and hidden.requires_grad):
            return forward(hidden)
        weights = [weight for weight in part.parameters() if weight.requires_grad]
        return TiledMLP.apply(Saved.apply(hidden), forward, tile, *weights)

    return forward_in_tiles
