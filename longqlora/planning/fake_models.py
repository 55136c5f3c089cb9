"""Models without a checkpoint: from a ``config.json`` alone, with weights that the caller makes, or fake ones."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Parameter
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from longqlora.config.settings import Precision, RopeExtension
from longqlora.modeling.loading import stored_dtype
from longqlora.modeling.rope import extend_context


def put_weights(
    model: PreTrainedModel,
    make: Callable[[torch.Size], torch.Tensor],
    quantized: Callable[[torch.Tensor], torch.nn.Module] | None = None,
) -> None:
    """Give a model without storage its weights, one after the other, so that at no time there is a 16-bit copy of all.

    Args:
        model: of transformers, on the meta device.
        make: from a shape to a new weight.
        quantized: from the weight of a linear layer, ``[out, in]``, to the layer that replaces it; the output layer stays.
    """
    output_layer = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        is_quantized = quantized is not None and isinstance(module, torch.nn.Linear) and module is not output_layer
        for key, weight in list(module.named_parameters(recurse=False)):
            new = make(weight.shape)
            if quantized and is_quantized and key == "weight":
                model.set_submodule(name, quantized(new))
            else:
                setattr(model.get_submodule(name), key, Parameter(new))
    if model.config.tie_word_embeddings:
        output_layer.weight = model.get_input_embeddings().weight
    decoder = model.get_decoder()  # the frequencies of its positions are no parameters
    if not hasattr(decoder, "rotary_emb"):
        raise ValueError(
            f"a {model.config.model_type} model cannot be planned, because it is not built like LLaMA (no rotary_emb)"
        )
    decoder.rotary_emb = type(decoder.rotary_emb)(config=model.config).to(new.device)


def fake_model(
    model: dict,
    *,
    precision: Precision,
    compute_dtype: torch.dtype,
    extension: RopeExtension | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """A model like that of :func:`longqlora.modeling.loading.load_model`, of fake tensors.

    Args:
        model: its ``config.json``.
        precision: of the weights.
        compute_dtype: of the device, which is that of the weights in the precisions ``auto``, ``int8`` and ``nf4``.
        extension: extends the context; None keeps it.
        attn_implementation: see ``load_model``.
    """
    config = config_of(model)
    if extension:
        extend_context(config, extension)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    layers = {"nf4": fake_quantized_layer, "int8": FakeInt8}
    quantized = layers.get(precision)
    dtype = compute_dtype if quantized or precision == "auto" else getattr(torch, precision)
    put_weights(
        built,
        lambda shape: torch.empty(shape, dtype=dtype),
        quantized and (lambda weight: quantized(weight, compute_dtype)),
    )
    built.is_loaded_in_4bit = precision == "nf4"  # peft asks
    return built


class FakeInt8(torch.nn.Module):
    """A linear layer of LLM.int8(): a byte for a weight, a float32 scale for a row; inputs are rounded to bytes."""

    def __init__(self, weight: torch.Tensor, compute_dtype: torch.dtype):
        super().__init__()
        self.weight = Parameter(torch.empty_like(weight, dtype=torch.int8), requires_grad=False)
        self.scales = Parameter(torch.empty(len(weight), dtype=torch.float32), requires_grad=False)
        self.bias = None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rounded = torch.empty_like(inputs, dtype=torch.int8)
        products = torch.empty(*inputs.shape[:-1], len(self.scales), dtype=torch.int32)
        outputs = products.to(inputs.dtype)
        del rounded
        return outputs


def config_of(model: dict):
    """The configuration of transformers with the contents of a ``config.json``."""
    return AutoConfig.for_model(model["model_type"]).from_dict(model)


def number_of_parameters(model: dict) -> int:
    """Weights of a model with this ``config.json``."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(model)).num_parameters()


def stored_bytes(model: dict) -> int:
    """Bytes of a weight as a checkpoint with this ``config.json`` stores it."""
    return stored_dtype(config_of(model)).itemsize


def with_layers(model: dict, number: int) -> dict:
    """A ``config.json`` with another number of layers."""
    kinds = {"layer_types": model["layer_types"][:number]} if model.get("layer_types") else {}
    return model | {"num_hidden_layers": number} | kinds


def fake_quantized_layer(weight: torch.Tensor, compute_dtype: torch.dtype) -> torch.nn.Module:
    """A linear layer in NF4 with double quantization, of a fake weight ``[out, in]``, which the class of 4-bit weights does not
    take."""
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Linear4bit

    rows, columns = weight.shape
    with _disable_current_modes():
        layer = Linear4bit(columns, rows, bias=False, compute_dtype=compute_dtype, quant_type="nf4", device="meta")
    values, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    packed: Any = Parameter(values, requires_grad=False)
    packed.quant_state, packed.quant_type, packed.compress_statistics = state, "nf4", True
    layer.support_avx512bf16_for_cpu = False  # a GPU does not repack weights for inference
    del layer.weight
    layer.weight = packed
    return layer
