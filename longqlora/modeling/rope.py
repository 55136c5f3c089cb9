"""Extending the context of a model with rotary position embeddings (RoPE), by one of the scalings of transformers.

* ``linear``: Position Interpolation (Chen et al. 2023, arXiv 2306.15595): every position is divided by the factor;
* ``dynamic``: NTK-aware scaling of theta by the length of the current sequence; up to the original length nothing changes;
* ``yarn``: YaRN (Peng et al. 2023, arXiv 2309.00071): high frequencies are kept, low ones interpolated, attention is
  rescaled;
* ``llama3``: the scaling of Llama 3.1: wavelengths beyond the original context are divided by the factor, short ones kept;
* ``ntk``: NTK-aware scaling that is the same at every length: ``rope_theta`` becomes theta · factor^(d / (d - 2)), where d is
  the width of a head. The model is stored as an ordinary one, so every server reads it right;
* ``theta``: the same with the ``rope_theta`` that is given (ABF, Xiong et al. 2023, arXiv 2309.16039).
"""

import math
from collections.abc import Iterator
from typing import get_args

from longqlora.config.settings import RopeExtension, RopeScaling

LARGER_THETA = ("ntk", "theta")


def interpolation_factor(target_context: int, original_length: int) -> float:
    """The whole number that positions are divided by, ``ceil(target / original)``: from 4096, 8192 gives 2 and 12288 gives 3.

    Raises:
        ValueError: if the target is below the model's own context.
    """
    if target_context < original_length:
        raise ValueError(f"target context length {target_context} is below the model's own context of {original_length} tokens")
    return float(math.ceil(target_context / original_length))


def extend_context(config, extension: RopeExtension):
    """Extend the context in a model's configuration, in place.

    A model that is scaled already gets a larger factor of the same scaling. The model's ``rope_theta`` is kept by all scalings
    but ``ntk`` and ``theta``; transformers would fall back to 10000 if the new parameters left it out.

    Args:
        config: a transformers configuration of a model with rotary position embeddings.
        extension: scaling and target context; the model's own context as target changes nothing.

    Raises:
        ValueError: if the model has no rotary embeddings, is scaled in another way, or has a longer context than the target.
    """
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        raise ValueError(f"{config.model_type} has no rotary position embeddings (RoPE): its context cannot be extended")
    own, scaling, target_context = rope_of(config), extension.scaling, extension.target_context
    context = own["target_context"]
    whole_factor = interpolation_factor(target_context, context)
    if whole_factor == 1:
        return config
    if own["rope_scaling"] not in ("none", scaling):
        raise ValueError(scaled_already(own["rope_scaling"]))
    factor = extension.factor or own["rope_factor"] * target_context / context
    if scaling == "linear" and not extension.factor:
        factor = own["rope_factor"] * whole_factor  # only Position Interpolation was published with whole factors
    config.rope_parameters = (
        enlarge_theta(config, extension, factor) if scaling in LARGER_THETA else scale(config, scaling, factor)
    )
    if scaling != "dynamic":  # the dynamic scaling reads the original length there, and scales beyond it
        config.max_position_embeddings = target_context
    return config


def scale(config, scaling: RopeScaling, factor: float) -> dict:
    """The ``rope_parameters`` of a model with one of transformers' scalings. Their other values are kept; YaRN's scaling of the
    attention follows from the factor."""
    rope, own = config.rope_parameters, rope_of(config)
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    original = original or round(own["target_context"] / own["rope_factor"])
    rope = {key: value for key, value in rope.items() if key != "attention_factor"} | {"rope_type": scaling, "factor": factor}
    if scaling in ("yarn", "llama3"):
        rope["original_max_position_embeddings"] = original
    if scaling == "llama3":
        rope = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} | rope  # as published with Llama 3.1
    if scaling == "linear":  # in its parameters, transformers warns of a key that it does not know
        config.original_max_position_embeddings = original
    return rope


def enlarge_theta(config, extension: RopeExtension, factor: float) -> dict:
    """The ``rope_parameters`` of a model with a larger ``rope_theta``: the given one, or that of NTK-aware scaling, with which
    the longest wavelength grows by the factor and the shortest one stays."""
    rope = config.rope_parameters
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = int(width * rope.get("partial_rotary_factor", 1.0))
    return rope | {"rope_theta": extension.theta or rope["rope_theta"] * factor ** (width / (width - 2))}


def scaled_already(own: str) -> str:
    """The message that a model's positions are scaled, and it was asked for another scaling."""
    further = f"only rope_scaling: {own} extends it further" if own in get_args(RopeScaling) else "it cannot be extended"
    return f"positions are scaled already ({own}): {further}; for another scaling, start from the unscaled model"


def scaling_problems(model: dict, extension: RopeExtension) -> Iterator[str]:
    """Yield why the context of a model cannot be extended in this way; every message names both values.

    Args:
        model: its ``config.json``. Fields that it leaves to the defaults of its family are not checked.
        extension: how its context is extended.
    """
    own, target_context = context_in(model), extension.target_context
    rope = model.get("rope_parameters") or model.get("rope_scaling") or {}
    kind = str(rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope)
    rope = rope if isinstance(rope, dict) else {}
    if own and kind == "dynamic":
        own = round(own * (rope.get("factor") or 1))
    if own and target_context < own:
        yield f"target_context {target_context} is below the model's own context of {own} tokens"
    elif target_context != own and kind not in ("default", extension.scaling):
        yield scaled_already(kind)
    elif target_context == own and (extension.factor or extension.theta):
        yield f"target_context {target_context} is the model's own context: rope_factor and rope_theta have no effect"
    elif extension.factor and kind == extension.scaling and extension.factor <= (rope.get("factor") or 1):
        yield f"rope_factor {extension.factor:g} is not above the model's own factor, {rope['factor']:g}, which it replaces"
    theta = model.get("rope_theta") or rope.get("rope_theta")
    if extension.theta and theta and extension.theta <= theta:
        yield f"rope_theta {extension.theta:g} is not above the model's own rope_theta, {theta:g}"


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
        rope_scaling (of :class:`RopeExtension`, another one that the model has, or ``none``; a larger ``rope_theta`` is none),
        rope_factor (1 without scaling) and target_context (tokens).
    """
    context, rope = context_of(config), getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") == "default":
        return {"rope_scaling": "none", "rope_factor": 1.0, "target_context": context}
    factor = float(rope.get("factor", 1.0))
    if rope["rope_type"] == "dynamic":  # max_position_embeddings is the original length
        context = round(context * factor)
    return {"rope_scaling": rope["rope_type"], "rope_factor": factor, "target_context": context}
