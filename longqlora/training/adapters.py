"""A LoRA adapter on a frozen base (LoRA, Hu et al. 2021, arXiv 2106.09685), and the dtypes that a 4-bit base trains in.

The linear layers of a 4-bit base return the dtype of their input. So the dtype of the embeddings and norms, which with the
output layer are the only weights that are not quantized, decides the dtype of every activation:

| compute dtype of the device | embeddings, norms, output layer | residual stream | inside the layers |
|:--|:--|:--|:--|
| bfloat16 (GPU) | bfloat16 | bfloat16 | bfloat16 |
| float16 (GPU) | float32 | float32, because a sum over many layers could overflow float16 | float16 |
| any (CPU) | float32 | float32 | float32 |

LoRA weights are float32 everywhere: a small update of a 16-bit weight would be lost.
"""

from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from longqlora.config.settings import TrainingSettings
from longqlora.modeling.devices import compute_dtype
from longqlora.training.lora_forward import use_short_forward


class BaseDtypes(NamedTuple):
    """The dtypes of a 4-bit base in training."""

    weights: torch.dtype
    """Dtype of the weights that are not quantized (embeddings, norms, output layer), and so of the residual stream."""
    layers: torch.dtype
    """Dtype of the norms' outputs, and so of the linear layers' inputs and outputs."""


FLOAT32 = BaseDtypes(torch.float32, torch.float32)


def base_dtypes(device: torch.device) -> BaseDtypes:
    """The dtypes that a 4-bit base trains in on a device; see the table of this module."""
    if device.type != "cuda":
        return FLOAT32
    dtype = compute_dtype(device)
    return BaseDtypes(torch.float32 if dtype is torch.float16 else dtype, dtype)


def add_adapter(
    model: PreTrainedModel,
    settings: TrainingSettings,
    *,
    base: BaseDtypes | None,
    trained: torch.dtype | None = torch.float32,
    revision: str | None = None,
) -> PeftModel:
    """Freeze a model and put a LoRA adapter on it; modules in ``modules_to_save`` are trained in full, as part of the adapter.

    Args:
        model: of transformers.
        settings: rank, alpha, rslora, dora, dropout, target_modules and modules_to_save.
        base: dtypes to train a 4-bit base in; None leaves the base as it is.
        trained: dtype of the trained weights; None leaves them as peft makes them, which is the base's dtype for copies of
            ``modules_to_save``.
        revision: of a model on the hub, recorded in the adapter's configuration.
    """
    if base:
        set_base_dtypes(model, base)
    trains_embeddings = any(name.split(".")[-1] == "embed_tokens" for name in settings.modules_to_save)
    alpha: Any = int(settings.alpha) if settings.alpha.is_integer() else settings.alpha  # peft declares an int
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=alpha,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        modules_to_save=settings.modules_to_save or None,
        revision=revision,
        ensure_weight_tying=trains_embeddings and model.config.tie_word_embeddings,
    )
    adapted: Any = get_peft_model(model, lora)
    for weight in adapted.parameters():
        if weight.requires_grad and trained:
            weight.data = weight.data.to(trained)
    if settings.zero_stage != 3:  # where a weight has no elements outside of its own layer's forward pass
        use_short_forward(adapted)
    return adapted


def set_base_dtypes(model: PreTrainedModel, dtypes: BaseDtypes) -> None:
    """Cast a 4-bit base to the dtypes that it trains in.

    Replaces peft's ``prepare_model_for_kbit_training``, which casts all weights that are not quantized to float32. The rest of
    that function is not needed: ``get_peft_model`` freezes the base as well, and only reentrant checkpointing needs embeddings
    whose output requires a gradient.
    """
    for weight in model.parameters():
        if weight.is_floating_point():  # 4-bit weights are packed into bytes
            weight.data = weight.data.to(dtypes.weights)
    if dtypes.layers is torch.float32:
        return
    for name, module in model.get_decoder().layers.named_modules():
        # not q_norm and k_norm (qwen3): RoPE computes with their output in float32, and attention casts the result once
        if name.endswith("layernorm"):
            # the hook stays on a copy that is trained in full (modules_to_save)
            module.register_forward_hook(lambda module, inputs, output: output.to(dtypes.layers))
