"""Extending the context of a model with rotary position embeddings (RoPE), by one of the scalings of transformers.

* ``linear``: Position Interpolation (Chen et al. 2023, arXiv 2306.15595): every position is divided by the factor;
* ``dynamic``: NTK-aware scaling of theta by the length of the current sequence; up to the original length nothing changes;
* ``yarn``: YaRN (Peng et al. 2023, arXiv 2309.00071): high frequencies are kept, low ones interpolated, attention is
  rescaled;
* ``llama3``: the scaling of Llama 3.1: wavelengths beyond the original context are divided by the factor, short ones kept.
"""

import math

from longqlora.config.settings import RopeExtension


def interpolation_factor(target_context: int, original_length: int) -> float:
    """The whole number that positions are divided by, ``ceil(target / original)``: from 4096, 8192 gives 2 and 12288 gives 3.

    Raises:
        ValueError: if the target is below the model's own context.
    """
    if target_context < original_length:
        raise ValueError(f"target context length {target_context} is below the model's own context of {original_length} tokens")
    return float(math.ceil(target_context / original_length))


def extend_context(config, extension: RopeExtension):
    """Extend the context in a model's configuration, in place. The model's ``rope_theta`` is kept; transformers would fall back
    to 10000 if the new parameters left it out.

    Args:
        config: a transformers configuration of a model with rotary position embeddings.
        extension: scaling and target context; the model's own context as target changes nothing.

    Raises:
        ValueError: if the model has no rotary embeddings, is scaled already, or has a longer context than the target.
    """
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        raise ValueError(f"{config.model_type} has no rotary position embeddings (RoPE): its context cannot be extended")
    scaling, target_context = extension.scaling, extension.target_context
    original = context_of(config)
    factor = interpolation_factor(target_context, original)
    if factor == 1:
        return config
    if rope["rope_type"] != "default":
        raise ValueError(f"the model's positions are scaled already ({rope}); start from the unscaled model")
    if scaling != "linear":
        factor = target_context / original  # only Position Interpolation was published with whole factors
    rope = {**rope, "rope_type": scaling, "factor": factor}
    if scaling in ("yarn", "llama3"):
        rope["original_max_position_embeddings"] = original
    if scaling == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # as published with Llama 3.1
    config.rope_parameters = rope
    if scaling == "linear":  # there transformers warns of a key that it does not know
        config.original_max_position_embeddings = original
    if scaling != "dynamic":  # the dynamic scaling reads the original length there, and scales beyond it
        config.max_position_embeddings = target_context
    return config


def context_in(model: dict) -> int | None:
    """The context length in a model's ``config.json``, in tokens; with a dynamic scaling, the original one.

    Many published models are scaled and keep the original length as ``max_position_embeddings``, others have the scaled one
    there. ``original_max_position_embeddings`` shows which, where it is given. Linear scalings are often without it: in the old
    form (``type`` for ``rope_type``) the length is the original one, as transformers demanded then; otherwise it is the scaled.

    Args:
        model: the ``config.json``.

    Returns:
        The scaled context; None if the file leaves it to the defaults of the model's family.
    """
    own, rope = model.get("max_position_embeddings"), model.get("rope_parameters") or model.get("rope_scaling")
    if not own or not isinstance(rope, dict):
        return own
    kind = rope.get("rope_type", rope.get("type"))
    original = rope.get("original_max_position_embeddings") or model.get("original_max_position_embeddings")
    if not original and (kind == "yarn" or (kind == "linear" and "type" in rope)):
        original = own
    if kind not in ("linear", "yarn", "llama3") or not original:
        return own
    scaled = round(original * (rope.get("factor") or 1))
    if kind == "yarn":  # some models have a length between both: Qwen3 adds that of an answer to the original one
        return max(own, scaled)
    return scaled if own <= original else own


def context_of(config) -> int:
    """The context length in a transformers configuration; see :func:`context_in`."""
    keys = ("max_position_embeddings", "original_max_position_embeddings", "rope_parameters")
    return context_in({key: getattr(config, key, None) for key in keys}) or config.max_seq_len  # MPT has no position embeddings


def rope_of(config) -> dict:
    """How a model's context is extended, as the results of an evaluation record it.

    Args:
        config: a transformers configuration.

    Returns:
        rope_scaling (of :class:`RopeExtension`, another one that the model has, or ``none``), rope_factor (1 without scaling)
        and target_context (tokens).
    """
    context, rope = context_of(config), getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") == "default":
        return {"rope_scaling": "none", "rope_factor": 1.0, "target_context": context}
    factor = float(rope.get("factor", 1.0))
    if rope["rope_type"] == "dynamic":  # max_position_embeddings is the original length
        context = round(context * factor)
    return {"rope_scaling": rope["rope_type"], "rope_factor": factor, "target_context": context}
