"""Merging an adapter into its base, shard by shard. The result is an ordinary model of transformers.

An adapter that was trained on a 4-bit base can be merged in two ways. Added to the dequantized NF4 weights, it gives exactly
the model that was trained, including the rounding errors of the quantization. Added to the 16-bit weights, it gives a slightly
different model. Which one is better is measured (:mod:`longqlora.publishing.merge_report`).
"""

import logging
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from longqlora.modeling.devices import weight_dtype
from longqlora.modeling.loading import NF4_BLOCK
from longqlora.publishing.weights import checkpoint_folder, read_weights, write_weights

log = logging.getLogger(__name__)

PREFIX = "base_model.model."  # of every tensor name in an adapter's file
MAGNITUDE = "lora_magnitude_vector"
ADAPTER_PART = re.compile(rf"\.(lora_[AB]\.weight|{MAGNITUDE})$")  # of a layer, in the name of a tensor
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


class Adapter:
    """The tensors of an adapter in peft's format: LoRA, rsLoRA (Kalajdzievski 2023, arXiv 2312.03732) or DoRA (Liu et al. 2024,
    arXiv 2402.09353).

    Args:
        folder: of the adapter.

    Attributes:
        scale: s = alpha / rank, for rsLoRA alpha / √rank.
        tensors: by name, without peft's prefix.
        weights: names of the weights in the base that the adapter changes or replaces.

    Raises:
        ValueError: if the adapter is of another kind (for example with biases, or ranks that differ from layer to layer).
    """

    def __init__(self, folder: str):
        config = LoraConfig.from_pretrained(folder)
        special = [key for key in ("rank_pattern", "alpha_pattern", "lora_bias") if getattr(config, key)]
        if special or config.bias != "none":
            raise ValueError(f"{folder}: only LoRA, rsLoRA and DoRA are merged here, found {', '.join(special) or 'bias'}")
        self.scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        with safe_open(Path(folder) / "adapter_model.safetensors", framework="pt") as file:
            self.tensors = {name.removeprefix(PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.weights = {ADAPTER_PART.sub(".weight", name) for name in self.tensors}

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The merged weight: W' = W + s B A, added in float32, or the adapter's own weight if it was trained in full. DoRA
        brings each row of W' to the length that was trained.

        Args:
            name: of the weight in the base.
            weight: ``[out, in]`` of a layer with an adapter; any other weight is returned unchanged.
        """
        if name in self.tensors:
            return self.tensors[name].to(weight.dtype)
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.weight" not in self.tensors:
            return weight
        down, up = (self.tensors[f"{layer}.lora_{part}.weight"].float() for part in "AB")  # [r, in], [out, r]
        merged = weight.float() + self.scale * (up @ down)
        if (magnitude := self.tensors.get(f"{layer}.{MAGNITUDE}")) is not None:  # [out]
            merged *= (magnitude.float() / merged.norm(dim=1))[:, None]
        return merged.to(weight.dtype)


def quantized_weights(config) -> set[str]:
    """Names of the weights that a 4-bit model quantizes: those of all linear layers but the output layer."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = [(name, part) for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    return {f"{name}.weight" for name, part in layers if part is not model.get_output_embeddings()}


def nf4_round_trip(weight: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Quantize a weight to NF4 with double quantization, as ``load_model`` does, and dequantize it."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    exact = weight.to(device, weight_dtype(device)).flatten()  # see dequantize_across_rows in longqlora.modeling.loading
    quantized, state = quantize_4bit(exact, blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(quantized, state).to("cpu", weight.dtype).reshape(weight.shape)


def merged_weights(
    folder: Path, adapter: Adapter, prepare: Callable[[str, torch.Tensor], torch.Tensor], tied: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the names and merged weights of a checkpoint.

    Args:
        folder: of the checkpoint.
        adapter: to merge.
        prepare: applied to a weight, given its name, before the adapter is added.
        tied: whether the output layer shares its weight with the embeddings; the weight is then written once.

    Raises:
        ValueError: if the adapter changes weights that the checkpoint does not have, or only one of two tied weights.
    """
    if tied and (HEAD in adapter.tensors) != (EMBEDDINGS in adapter.tensors):
        raise ValueError(
            f"the adapter has one of {HEAD} and {EMBEDDINGS}, which share a weight in the base: it cannot be merged"
        )
    written = set()
    for name, weight in read_weights(folder):
        if tied and name == HEAD:  # a checkpoint may hold a tied weight under either name, or both
            name = EMBEDDINGS
        if name not in written:
            written.add(name)
            yield name, adapter.apply(name, prepare(name, weight))
    missing = adapter.weights - written - ({HEAD} if tied else set())
    if missing:
        raise ValueError(
            f"{folder}: has no weight {', '.join(sorted(missing)[:3])}, which the adapter changes: is it of another base model?"
        )


def merge_weights(base_model: str, adapter: str, output: Path, *, config, from_nf4: bool, device: torch.device) -> None:
    """Write the merged model to a new folder, in the precision that the base is stored in, with one shard in memory.

    Args:
        base_model: directory or hub id that the adapter was trained on.
        adapter: folder of the adapter, in peft's format.
        output: folder to write to.
        config: of the model, with the context extended as in training.
        from_nf4: add the adapter to the dequantized NF4 weights instead of the stored weights.
        device: quantizes the weights.
    """
    rounded = quantized_weights(config) if from_nf4 else set()
    output.mkdir(parents=True)
    weights = merged_weights(
        checkpoint_folder(base_model),
        Adapter(adapter),
        lambda name, weight: nf4_round_trip(weight, device) if name in rounded else weight,
        config.tie_word_embeddings,
    )
    write_weights(output, weights)
    config.save_pretrained(output)
    log.info("merged %s into %s%s", adapter, base_model, " after a round trip through NF4" if from_nf4 else "")
