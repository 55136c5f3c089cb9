"""A LoRA adapter on a frozen base (LoRA, Hu et al. 2021, arXiv 2106.09685), and the types that a 4-bit base trains in.

The linear layers of a 4-bit base return the type of their input. So the type of the embeddings and norms, the only weights that
are not quantized (beside the output layer), is the type of every activation:

| compute type of the device | embeddings, norms, output layer | residual stream | inside the layers |
|:--|:--|:--|:--|
| bfloat16 (GPU) | bfloat16 | bfloat16 | bfloat16 |
| float16 (GPU) | float32 | float32, because a sum over many layers could overflow float16 | float16 |
| any (CPU) | float32 | float32 | float32 |

LoRA weights are float32 everywhere: a small update of a 16-bit weight would be lost.
"""

from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from longqlora.modeling.devices import compute_dtype


class BaseTypes(NamedTuple):
    """The types of a 4-bit base in training."""

    weights: torch.dtype
    """Of what is not quantized: embeddings, norms, output layer. The residual stream has it too."""
    layers: torch.dtype
    """Of what the linear layers get from the norms before them, and so of what they return."""


def base_types(device: torch.device) -> BaseTypes:
    """The types that a 4-bit base trains in on a device, see the table above."""
    if device.type != "cuda":
        return BaseTypes(torch.float32, torch.float32)
    dtype = compute_dtype(device)
    return BaseTypes(torch.float32 if dtype is torch.float16 else dtype, dtype)


def add_adapter(model: PreTrainedModel, settings: dict, *, types: BaseTypes | None = None) -> PeftModel:
    """Freeze a model and put a LoRA adapter on it; the modules of ``modules_to_save`` are trained whole, as part of it.

    Args:
        settings: the system's ``training`` section (method, rank, alpha, dropout, target_modules, modules_to_save, zero_stage).
        types: of a 4-bit base (method ``qlora``); None: those of its device, or float32 for DeepSpeed, which casts the model
            itself.
    """
    if settings["method"] == "qlora":
        default = BaseTypes(torch.float32, torch.float32) if settings["zero_stage"] else base_types(model.device)
        set_base_types(model, types or default)
    trains_embeddings = any(name.split(".")[-1] == "embed_tokens" for name in settings["modules_to_save"])
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        target_modules=settings["target_modules"],
        modules_to_save=settings["modules_to_save"] or None,
        ensure_weight_tying=trains_embeddings and model.config.tie_word_embeddings,
    )
    model = get_peft_model(model, lora)
    for weight in model.parameters():
        # peft leaves copies of modules_to_save in 16 bit, where small updates would be lost; DeepSpeed has float32 of its own
        if weight.requires_grad and not settings["zero_stage"]:
            weight.data = weight.data.float()
    return model


def set_base_types(model: PreTrainedModel, types: BaseTypes) -> None:
    """Give a 4-bit base the types that it trains in.

    This takes the place of peft's ``prepare_model_for_kbit_training``, which makes all that is not quantized float32. What
    else that function does is not needed: ``get_peft_model`` freezes the base as well, and the embeddings' output must require
    a gradient for reentrant checkpointing only.
    """
    for weight in model.parameters():
        if weight.is_floating_point():  # 4-bit weights are packed into bytes
            weight.data = weight.data.to(types.weights)
    if types.layers is torch.float32:
        return
    for name, module in model.get_decoder().layers.named_modules():
        # not q_norm and k_norm (qwen3): RoPE turns what they return in float32, and attention casts it once, behind that
        if name.endswith("layernorm"):
            # a copy that is trained whole (modules_to_save) keeps the hook
            module.register_forward_hook(lambda module, inputs, output: output.to(types.layers))
