"""Lets ``longqlora`` be imported on a bare machine, where something is missing that no step needs or that is replaced here.

Imported before it, for this effect.
"""

import importlib
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

GATHERED = Path(__file__).resolve().parent.parent / ".gpu"
"""Folder of what ``gpu_check.sh prepare`` gathers, torch 2.13's chunked loss in two files among it."""


def load_gathered(name: str) -> ModuleType:
    """A Python file of :data:`GATHERED` as a module."""
    spec = spec_from_file_location(f"gathered_{name}", GATHERED / f"{name}.py")
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gathered_loss() -> tuple[type, Callable]:
    """``LinearCrossEntropyOptions`` and ``linear_cross_entropy`` of torch 2.13, from its own two files.

    The function calls torch's operators as ``torch.nn.functional`` does, for what ``longqlora`` asks of it: ``reduction`` is
    ``sum`` or ``none``, and there are options.
    """
    operators = load_gathered("linear_cross_entropy")

    def linear_cross_entropy(hidden, weight, targets, reduction="none", options=None) -> torch.Tensor:
        sizes = {"num_batches": hidden.shape[0], "in_features": hidden.shape[1], "num_classes": weight.shape[0]}
        options = options._adjust(**sizes, dtype=hidden.dtype, device=hidden.device)
        given, chunks = (hidden, weight, targets, None, None), (options.batch_chunk_size, options.acc_policy, options.acc_dtype)
        if reduction == "none":
            return operators._linear_cross_entropy_batch_chunked_no_reduction(*given, -100, *chunks)
        needed = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight)]
        return operators._linear_cross_entropy_batch_chunked(
            *given, reduction, -100, 0.0, *chunks, options.allow_retain_graph, *needed, False
        )[0]

    return load_gathered("linear_cross_entropy_options").LinearCrossEntropyOptions, linear_cross_entropy


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
    if not hasattr(torch.nn, "LinearCrossEntropyOptions") and (GATHERED / "linear_cross_entropy.py").exists():
        missing.append("torch.nn.functional.linear_cross_entropy (that of torch 2.13 is used)")
        torch.nn.LinearCrossEntropyOptions, torch.nn.functional.linear_cross_entropy = gathered_loss()
    elif not hasattr(torch.nn, "LinearCrossEntropyOptions"):
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
