"""Lets ``longqlora`` be imported on a bare machine, where something is missing that no step needs or that is replaced here.

Imported before it, for this effect.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint


def checkpointed_cross_entropy(hidden, weight, targets, reduction="none", options=None) -> torch.Tensor:
    """What ``linear_cross_entropy`` gives, 1024 positions at a time whose logits are computed again in the backward pass.

    Args:
        hidden: ``[positions, width]``
        weight: ``[vocabulary, width]``
        targets: ``[positions]``
        reduction: ``none`` or ``sum``.

    Returns:
        ``[positions]``, or their sum
    """

    def losses_of(states, ids):
        return cross_entropy((states @ weight.T).float(), ids, reduction="none")

    chunks = zip(hidden.split(1024), targets.split(1024), strict=True)
    losses = torch.cat([checkpoint(losses_of, *chunk, use_reentrant=False) for chunk in chunks])
    return losses.sum() if reduction == "sum" else losses


def stand_in_for_missing() -> list[str]:
    """Let ``longqlora`` be imported where something is missing that no step needs, or for which there is a replacement here;
    return what that was."""
    missing = []
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        missing.append("torch.nn.functional.linear_cross_entropy (ours uses a chunked loss of the benchmark instead)")
        torch.nn.LinearCrossEntropyOptions = dict
        torch.nn.functional.linear_cross_entropy = checkpointed_cross_entropy
    for name in ("torch.utils.tensorboard", "pyarrow", "pyarrow.compute", "pandas"):  # events, data from disk, tables
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(f"{name} (no step needs it)")
            sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None), __path__=[])
    return missing


STOOD_IN_FOR = stand_in_for_missing()
