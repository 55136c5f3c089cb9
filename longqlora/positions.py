"""Position Interpolation (Chen et al. 2023, arXiv 2306.15595): positions divided by ``factor``, so that a longer context
falls into the range of positions that the model was trained on."""

import math


def interpolation_factor(target_length: int, original_length: int) -> float:
    """The whole factor by which positions are divided: ``ceil(target / original)``; 8192 from 4096 is 2, 12288 is 3.

    Raises:
        ValueError: if the target is below the model's own context.
    """
    if target_length < original_length:
        raise ValueError(f"target context length {target_length} is below the model's own context of {original_length} tokens")
    return float(math.ceil(target_length / original_length))


def extend_context(config, target_length: int):
    """Set the model configuration to ``target_length`` tokens by linear interpolation, in place; the model's own
    ``rope_theta`` is kept (transformers would fall back to 10000 if it were left out).

    Args:
        config: a transformers configuration of a model with rotary position embeddings.
        target_length: context in tokens; the model's own changes nothing.

    Raises:
        ValueError: if the model has no rotary embeddings, is scaled already, or has a longer context than the target.
    """
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        raise ValueError(f"{config.model_type} has no rotary position embeddings (RoPE): its context cannot be interpolated")
    factor = interpolation_factor(target_length, config.max_position_embeddings)
    if factor == 1:
        return config
    if rope["rope_type"] != "default":
        raise ValueError(f"the model's positions are scaled already ({rope}); start from the unscaled model")
    config.rope_parameters = {**rope, "rope_type": "linear", "factor": factor}
    config.max_position_embeddings = target_length
    return config
