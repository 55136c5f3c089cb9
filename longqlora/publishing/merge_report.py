"""The merge report: compares the adapter as it was trained, its merges, and the base without it, on held-out training text.

The merge with the lowest loss is published, unless it is clearly worse than the adapter as trained. The text is the end of the
training data, which no training has seen; evaluation sets decide nothing. The report also has the distance of every model from
the trained one: the divergence of its next-token distributions, KL(trained ‖ model) in nats, and how often both models agree on
the most likely token.
"""

import gc
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from longqlora.config.settings import Device, MergeSettings, Precision, RopeExtension
from longqlora.data.packing import load_held_out
from longqlora.data.token_files import IGNORED
from longqlora.jobs.memory import memory_explained
from longqlora.modeling.chunked_loss import summed_nll
from longqlora.modeling.devices import dtype_name, find_device, keep_freed_memory, weight_dtype
from longqlora.modeling.loading import load_config, load_model, put_adapter, stored_dtype
from longqlora.publishing.merging import merge_weights

log = logging.getLogger(__name__)

COMPARED_POSITIONS = 512  # positions, spread evenly over the text, whose next-token distributions are compared
RESERVED_BYTES = 2 * 2**30  # GPU memory that a compared model needs besides its weights
MERGES = {"16-bit": False, "NF4 round trip": True}
"""Merges by name: whether the adapter is added to the dequantized NF4 weights (see :mod:`longqlora.publishing.merging`)."""
MEMORY_ADVICE = (
    "A smaller model, or more memory: merging holds one shard of at most 5 GB, the comparison one model, in 4 bit if need be."
)


class MergeRejected(ValueError):
    """The merge is clearly worse than the adapter as it was trained."""


@dataclass(frozen=True)
class MergeFiles:
    """The inputs and output of a merge.

    Attributes:
        base_model: directory or hub id of the model that the adapter was trained on.
        adapter: folder of the adapter, in peft's format.
        data: the training data; the merges are compared on their held-out end.
        output: folder for the merged weights and their configuration.
    """

    base_model: str
    adapter: str
    data: str
    output: str


@dataclass(frozen=True)
class Comparison:
    """How the models are loaded that are compared.

    Attributes:
        device: of the models.
        precision: of the merges and the base.
        trained_precision: of the base under the adapter.
        extension: of the base's context, as in training.
    """

    device: torch.device
    precision: Precision
    trained_precision: Precision
    extension: RopeExtension


def merge_adapter(*, files: MergeFiles, card: dict, settings: MergeSettings, device: Device) -> dict:
    """Merge an adapter in every way that fits its training, compare the merges, and keep the best one.

    Args:
        files: inputs and output.
        card: the training card, see :func:`longqlora.training.train.train`.
        settings: when a merge is good enough.
        device: where weights are quantized and models are compared.

    Returns:
        The merge report.

    Raises:
        MergeRejected: if the perplexity of the best merge is too high; the message has the figures.
        MemoryError: if memory is exhausted; the message says what to change.
    """
    torch_device = find_device(device)
    keep_freed_memory(torch_device)
    extension = RopeExtension(
        scaling=card["rope_scaling"],
        target_context=card["target_context"],
        factor=card["rope_factor"],
        theta=card["rope_theta"],
    )
    is_quantized = card["settings"]["method"] == "qlora"
    merges = {name: from_nf4 for name, from_nf4 in MERGES.items() if is_quantized or not from_nf4}
    folders = {name: Path(files.output) / f"merge-{number}" for number, name in enumerate(merges)}
    with memory_explained(f"merging {files.adapter} into {files.base_model}", MEMORY_ADVICE):
        for name, from_nf4 in merges.items():
            config = load_config(files.base_model, extension)
            merge_weights(files.base_model, files.adapter, folders[name], config=config, from_nf4=from_nf4, device=torch_device)
        precision = comparison_precision(files.base_model, torch_device)
        comparison = Comparison(torch_device, precision, "nf4" if is_quantized else precision, extension)
        windows, held_out = load_held_out(
            files.data, extension.target_context, isolate_documents=card["settings"]["isolate_documents"]
        )
        if not held_out:
            log.warning("%s: too few data to hold any out; the merges are compared on text that was trained on", files.data)
        models = models_to_compare(files, folders, comparison)
        measured = compare_models(models, windows)
    best = min(merges, key=lambda name: measured[f"merge: {name}"]["mean_nll"])
    check_merge(measured[next(iter(models))], measured[f"merge: {best}"], settings.max_perplexity_ratio)
    keep_best(folders, best, Path(files.output))
    return {
        "published": f"merge: {best}",
        "sample": {
            "tokens": sum(len(window["input_ids"]) for window in windows),
            "window": extension.target_context,
            "path": files.data,
            "held_out": held_out,
        },
        "precision": {"trained": comparison.trained_precision, "others": precision},
        "max_perplexity_ratio": settings.max_perplexity_ratio,
        "models": measured,
    }


def models_to_compare(files: MergeFiles, folders: dict[str, Path], how: Comparison) -> dict[str, Callable]:
    """Functions that load the adapter as trained, each merge, and the base without the adapter, by their names in the report.

    Args:
        files: base model and adapter.
        folders: of the merges, by name.
        how: device, precisions and context extension.
    """
    load_base = partial(load_model, files.base_model, device=how.device, extension=how.extension)

    def load_trained() -> PreTrainedModel:
        model = load_base(precision=how.trained_precision)
        put_adapter(model, files.adapter)
        return model

    base_kind = "NF4" if how.trained_precision == "nf4" else "16-bit"
    models: dict[str, Callable] = {f"adapter on the {base_kind} base, as trained": load_trained}
    for name, folder in folders.items():  # the configuration of a merge has the extended context
        models[f"merge: {name}"] = partial(load_model, str(folder), device=how.device, precision=how.precision)
    return models | {"base, positions scaled, no adapter": partial(load_base, precision=how.precision)}


@torch.inference_mode()
def measure(model, windows: list[dict[str, torch.Tensor]]) -> tuple[float, torch.Tensor]:
    """Loss of a model on a text, and its next-token distributions at positions spread evenly over it, in one pass.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        windows: the text; each window has input_ids, labels and, if documents are packed, position_ids, ``[n]``.

    Returns:
        Mean negative log-likelihood (nats) of the tokens that have a label; and log-probabilities,
        ``[positions, vocabulary]``, float32 on the CPU.
    """
    device, head = model.get_input_embeddings().weight.device, model.get_output_embeddings()
    every = max(1, sum(len(window["input_ids"]) for window in windows) // COMPARED_POSITIONS)
    total, count, seen = 0.0, 0, 0
    rows: list[torch.Tensor] = []
    for window in windows:
        given = {name: value[None].to(device) for name, value in window.items() if name != "labels"}
        hidden = model.get_decoder()(**given, use_cache=False).last_hidden_state[0]  # [n, width]
        targets = window["labels"][1:].to(device)
        total += summed_nll(hidden[:-1], head.weight, targets).item()
        count += int((targets != IGNORED).sum())
        first = (every - 1 - seen) % every  # counted over all windows, because a window may be shorter than ``every``
        rows.append(head(hidden[first::every]).float().log_softmax(-1).cpu())
        seen += len(hidden)
    return total / max(1, count), torch.cat(rows)


def compare_distributions(trained: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """Distances of a model's next-token distributions from those of the trained model.

    Args:
        trained, other: ``[positions, vocabulary]``, log-probabilities.

    Returns:
        kl_divergence (nats), top_1_agreement (share of the positions), largest_difference (of log-probabilities).
    """
    divergence = (trained.exp() * (trained - other)).sum(-1).mean()
    return {
        "kl_divergence": max(0.0, float(divergence)),  # rounding may make it slightly negative
        "top_1_agreement": float((trained.argmax(-1) == other.argmax(-1)).float().mean()),
        "largest_difference": float((trained - other).abs().max()),
    }


def compare_models(models: dict[str, Callable], windows: list[dict[str, torch.Tensor]]) -> dict[str, dict[str, float]]:
    """Measure models on the same text, and compare all of them with the first one.

    Args:
        models: functions that load a model, by its name; one model at a time is in memory.
        windows: see :func:`measure`.

    Returns:
        By model: mean_nll (nats), perplexity, and the values of :func:`compare_distributions`.
    """
    measured: dict[str, dict[str, float]] = {}
    reference: torch.Tensor | None = None
    for name, load in models.items():
        model = load().eval()
        loss, rows = measure(model, windows)
        reference = rows if reference is None else reference
        perplexity = torch.tensor(loss, dtype=torch.float64).exp().item()  # infinite where math.exp raises an error
        measured[name] = {"mean_nll": loss, "perplexity": perplexity, **compare_distributions(reference, rows)}
        log.info("%s: %s", name, ", ".join(f"{key} {value:.5g}" for key, value in measured[name].items()))
        del model
        gc.collect()  # quantized layers of bitsandbytes are in reference cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return measured


def comparison_precision(base_model: str, device: torch.device) -> Precision:
    """The precision in which the merges and the base are compared: on a GPU 16 bit, or 8 or 4 bit if 16-bit weights do not fit
    into free memory; on a CPU float32 if the base is stored in it, else bfloat16."""
    config = load_config(base_model)
    if device.type == "cpu":
        return "float32" if stored_dtype(config) is torch.float32 else "bfloat16"
    with torch.device("meta"):
        num_parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    free, _ = torch.cuda.mem_get_info(device)
    preferred: Any = dtype_name(weight_dtype(device))
    return precision_that_fits(num_parameters, free, preferred)


def precision_that_fits(num_parameters: int, free_bytes: int, preferred: Precision) -> Precision:
    """The first precision of ``preferred`` (16 bit), ``int8`` and ``nf4`` in which a model fits into free GPU memory."""
    if num_parameters * 2.0 + RESERVED_BYTES <= free_bytes:
        return preferred
    if num_parameters * 1.1 + RESERVED_BYTES <= free_bytes:  # embeddings and output layer stay in 16 bit
        return "int8"
    return "nf4"


def check_merge(trained: dict, merge: dict, max_perplexity_ratio: float) -> None:
    """Check that a merge is not clearly worse than the adapter as trained.

    Args:
        trained, merge: their measurements, of :func:`compare_models`.
        max_perplexity_ratio: largest perplexity of the merge, relative to that of the adapter as trained.

    Raises:
        MergeRejected: if the perplexity is above it, or not a number.
    """
    ratio = merge["perplexity"] / trained["perplexity"]
    if not ratio <= max_perplexity_ratio:  # also true if the ratio is not a number
        raise MergeRejected(
            f"the merge has perplexity {merge['perplexity']:.4g}, the adapter as trained {trained['perplexity']:.4g}: a ratio "
            f"of {ratio:.4g}, above merge.max_perplexity_ratio {max_perplexity_ratio:g}, so it is not published. Is the base "
            "model the one that was trained on? Evaluate the adapter unmerged (merged: false, target perplexity_report), or "
            "raise the ratio."
        )


def keep_best(folders: dict[str, Path], best: str, output: Path) -> None:
    """Move the best merge from its own folder to the output folder, and remove the others."""
    for path in folders[best].iterdir():
        path.rename(output / path.name)
    for folder in folders.values():
        shutil.rmtree(folder)
