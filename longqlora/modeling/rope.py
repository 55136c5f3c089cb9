"""Extending the context of a model with rotary position embeddings (RoPE), by the scalings that transformers has.

* ``linear``: Position Interpolation (Chen et al. 2023, arXiv 2306.15595): every position divided by the factor;
* ``dynamic``: NTK-aware scaling of the base by the length of the sequence at hand; within the original length nothing changes;
* ``yarn``: YaRN (Peng et al. 2023, arXiv 2309.00071): high frequencies kept, low ones interpolated, attention rescaled;
* ``llama3``: Llama 3.1's: wavelengths beyond the original context divided by the factor, short ones kept.
"""

import math

ROPE_SCALINGS = ("linear", "dynamic", "yarn", "llama3")


def interpolation_factor(target_context: int, original_length: int) -> float:
    """The whole factor by which positions are divided: ``ceil(target / original)``; 8192 from 4096 is 2, 12288 is 3.

    Raises:
        ValueError: if the target is below the model's own context.
    """
    if target_context < original_length:
        raise ValueError(f"target context length {target_context} is below the model's own context of {original_length} tokens")
    return float(math.ceil(target_context / original_length))


def extend_context(config, target_context: int, rope_scaling: str = "linear"):
    """Set the model configuration to ``target_context`` tokens, in place; the model's own ``rope_theta`` is kept (transformers
    would fall back to 10000 if it were left out).

    Args:
        config: a transformers configuration of a model with rotary position embeddings.
        target_context: context in tokens; the model's own changes nothing.
        rope_scaling: one of :data:`ROPE_SCALINGS`.

    Raises:
        ValueError: if the model has no rotary embeddings, is scaled already, or has a longer context than the target; or the
            scaling is unknown.
    """
    if rope_scaling not in ROPE_SCALINGS:
        raise ValueError(f"rope scaling {rope_scaling!r} is unknown; known are {', '.join(ROPE_SCALINGS)}")
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        raise ValueError(f"{config.model_type} has no rotary position embeddings (RoPE): its context cannot be extended")
    original = config.max_position_embeddings
    factor = interpolation_factor(target_context, original)
    if factor == 1:
        return config
    if rope["rope_type"] != "default":
        raise ValueError(f"the model's positions are scaled already ({rope}); start from the unscaled model")
    if rope_scaling != "linear":
        factor = target_context / original  # Position Interpolation alone was published with whole factors
    rope = {**rope, "rope_type": rope_scaling, "factor": factor}
    if rope_scaling in ("yarn", "llama3"):
        rope["original_max_position_embeddings"] = original
    if rope_scaling == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # as published with Llama 3.1
    config.rope_parameters = rope
    if rope_scaling != "dynamic":  # which finds the original length there, and scales beyond it
        config.max_position_embeddings = target_context
    return config


def context_of(config) -> int:
    """Context length that a model is made for, in tokens; that of a dynamic scaling is the length where the scaling begins."""
    return getattr(config, "max_position_embeddings", None) or config.max_seq_len  # MPT, which has no position embeddings


def rope_of(config) -> dict:
    """How far and by what a model's context is extended, as records are stamped with it.

    Args:
        config: a transformers configuration.

    Returns:
        rope_scaling (one of :data:`ROPE_SCALINGS`, another of the model's own, or ``none``), rope_factor (1 without scaling),
        and target_context, the tokens that the model is made for.
    """
    context, rope = context_of(config), getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") == "default":
        return {"rope_scaling": "none", "rope_factor": 1.0, "target_context": context}
    factor = float(rope.get("factor", 1.0))
    if rope["rope_type"] == "dynamic":  # its configuration keeps the original length
        context = round(context * factor)
    return {"rope_scaling": rope["rope_type"], "rope_factor": factor, "target_context": context}
