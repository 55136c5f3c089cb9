"""The merge report: the adapter as it was trained, its merges and the base without it, compared on held-out training text.

The loss decides which merge is published, on the end of the training data that no training has seen; evaluation sets decide
nothing. A merge that is clearly worse than the adapter as trained is not published. How far each model is from the one that
was trained is shown by the divergence of their next-token distributions, KL(trained ‖ model) in nats, and by how often both
find the same token most likely.
"""

import gc
import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from longqlora.data.packing import load_held_out
from longqlora.data.token_files import IGNORED
from longqlora.jobs.memory import memory_explained
from longqlora.modeling.chunked_loss import summed_nll
from longqlora.modeling.devices import find_device, name_of, weight_dtype
from longqlora.modeling.loading import load_config, load_model, stored_dtype
from longqlora.publishing.merging import merge_weights

log = logging.getLogger(__name__)

LOGIT_POSITIONS = 512  # spread over the text, whose distributions are compared
ALLOWANCE = 2 * 2**30  # bytes of a GPU for all but the weights of a model that is compared
MERGES = {"16-bit": False, "NF4 round trip": True}


class MergeRejected(ValueError):
    """A merge that is clearly worse than the adapter as it was trained."""


@torch.inference_mode()
def measure(model, windows: list[dict[str, torch.Tensor]]) -> tuple[float, torch.Tensor]:
    """Loss of a model on some text, and its next-token distributions at places spread evenly over it, in one forward pass.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        windows: input_ids, labels and perhaps position_ids of each, ``[n]``.

    Returns:
        Mean negative log-likelihood (nats) of the tokens with a label; and the logarithms of the probabilities,
        ``[positions, vocabulary]``, float32 on the CPU.
    """
    device, head = model.get_input_embeddings().weight.device, model.get_output_embeddings()
    every = max(1, sum(len(window["input_ids"]) for window in windows) // LOGIT_POSITIONS)
    total, count, rows, seen = 0.0, 0, [], 0
    for window in windows:
        given = {name: value[None].to(device) for name, value in window.items() if name != "labels"}
        hidden = model.get_decoder()(**given, use_cache=False).last_hidden_state[0]  # [n, width]
        targets = window["labels"][1:].to(device)
        total += summed_nll(hidden[:-1], head.weight, targets).item()
        count += int((targets != IGNORED).sum())
        first = (every - 1 - seen) % every  # counted through all windows: one may be shorter than the distance of two places
        rows.append(head(hidden[first::every]).float().log_softmax(-1).cpu())
        seen += len(hidden)
    return total / max(1, count), torch.cat(rows)


def compare(trained: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """How far the distributions of a model are from those of the trained one.

    Args:
        trained, other: ``[positions, vocabulary]``, logarithms of probabilities.
    """
    divergence = (trained.exp() * (trained - other)).sum(-1).mean()
    return {
        "kl_divergence": max(0.0, float(divergence)),  # rounding may leave it a hair below zero
        "top_1_agreement": float((trained.argmax(-1) == other.argmax(-1)).float().mean()),
        "largest_difference": float((trained - other).abs().max()),
    }


def compare_models(models: dict[str, Callable], windows: list[dict[str, torch.Tensor]]) -> dict[str, dict[str, float]]:
    """Measure models one after the other on the same text; the first is the one that the others are compared with.

    Args:
        models: for each a function that loads it, so that one at a time is in memory.
        windows: see :func:`measure`.

    Returns:
        By model: mean_nll (nats), perplexity, and what :func:`compare` returns.
    """
    measured, trained = {}, None
    for name, load in models.items():
        model = load().eval()
        loss, rows = measure(model, windows)
        trained = rows if trained is None else trained
        perplexity = torch.tensor(loss, dtype=torch.float64).exp().item()  # infinite where math.exp would fail
        measured[name] = {"mean_nll": loss, "perplexity": perplexity, **compare(trained, rows)}
        log.info("%s: %s", name, ", ".join(f"{key} {value:.5g}" for key, value in measured[name].items()))
        del model
        gc.collect()  # quantized layers of bitsandbytes refer to themselves
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return measured


def comparison_precision(base_model: str, device: torch.device) -> str:
    """The precision to compare models in that are not quantized: the GPU's, or 8 or 4 bit where its weights do not fit into the
    memory that is free; on a CPU bfloat16, unless the base is stored in float32."""
    config = load_config(base_model)
    if device.type == "cpu":
        return "float32" if stored_dtype(config) is torch.float32 else "bfloat16"
    with torch.device("meta"):
        num_parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    free, _ = torch.cuda.mem_get_info(device)
    return precision_that_fits(num_parameters, free, name_of(weight_dtype(device)))


def precision_that_fits(num_parameters: int, free_bytes: int, preferred: str) -> str:
    """``preferred`` (a 16-bit type) if a model's weights fit in it into so many bytes of a GPU, else ``int8`` or ``nf4``."""
    for precision, bytes_each in ((preferred, 2.0), ("int8", 1.1)):  # in 8 bit embeddings and output layer stay in 16 bit
        if num_parameters * bytes_each + ALLOWANCE <= free_bytes:
            return precision
    return "nf4"


def merge_adapter(
    *, base_model: str, adapter: str, output: str, card: dict, data: str, max_perplexity_ratio: float, device: str
) -> dict:
    """Merge an adapter in each way that fits how it was trained, compare the merges, and keep the better one.

    Args:
        base_model: directory or hub id that the adapter was trained on.
        adapter: folder of the adapter, in peft's format.
        output: folder of the merged weights and their configuration, with the rope scaling.
        card: the training card, see :func:`longqlora.training.train.train`.
        data: the training data, of whose held-out end the merges are compared.
        max_perplexity_ratio: largest perplexity of the merge, over that of the adapter as trained, with which it is kept.
        device: ``cpu`` or ``cuda``.

    Returns:
        The merge report.

    Raises:
        MergeRejected: if the better merge is above that ratio; the message has the figures.
        MemoryError: saying what to change.
    """
    where, settings = find_device(device), card["settings"]
    context = {"target_context": card["target_context"], "rope_scaling": card["rope_scaling"]}
    quantized = settings["method"] == "qlora"
    merges = {name: from_nf4 for name, from_nf4 in MERGES.items() if quantized or not from_nf4}
    folders = {name: Path(output) / f"merge-{number}" for number, name in enumerate(merges)}
    advice = "A smaller model, or more memory: merging holds one shard of at most 5 GB, comparing one model in 4 bit at least."
    with memory_explained(f"merging {adapter} into {base_model}", advice):
        for name, from_nf4 in merges.items():
            config = load_config(base_model, **context)
            merge_weights(base_model, adapter, folders[name], config=config, from_nf4=from_nf4, device=where)
        precision = comparison_precision(base_model, where)
        windows, held_out = load_held_out(data, card["target_context"], isolate_documents=settings["isolate_documents"])
        if not held_out:
            log.warning("%s: too few data to hold any out; the merges are compared on what was trained on", data)
        trained_in = "nf4" if quantized else precision
        models = models_to_compare(base_model, adapter, folders, where, precision, trained_in, context)
        measured = compare_models(models, windows)
    best = min(merges, key=lambda name: measured[f"merge: {name}"]["mean_nll"])
    check_merge(measured[next(iter(models))], measured[f"merge: {best}"], max_perplexity_ratio)
    keep(folders, best, Path(output))
    return {
        "published": f"merge: {best}",
        "sample": {
            "tokens": sum(len(window["input_ids"]) for window in windows),
            "window": card["target_context"],
            "path": data,
            "held_out": held_out,
        },
        "precision": {"trained": trained_in, "others": precision},
        "max_perplexity_ratio": max_perplexity_ratio,
        "models": measured,
    }


def models_to_compare(
    base_model: str,
    adapter: str,
    folders: dict[str, Path],
    device: torch.device,
    precision: str,
    trained_in: str,
    context: dict,
) -> dict[str, Callable]:
    """Functions that load the adapter as trained, each merge, and the base without the adapter, by their names in the report.

    Args:
        folders: of the merges, by their names.
        precision: of all but the first, which has ``trained_in``.
        context: target_context and rope_scaling of the training.
    """

    def load_trained():
        base = load_model(base_model, device=device, precision=trained_in, **context)
        return PeftModel.from_pretrained(base, adapter).base_model.model  # its layers have the adapter in them

    def load_merge(folder: Path):
        return load_model(str(folder), device=device, precision=precision)  # its configuration has the scaling

    models = {f"adapter on the {'NF4' if trained_in == 'nf4' else '16-bit'} base, as trained": load_trained}
    models |= {f"merge: {name}": partial(load_merge, folder) for name, folder in folders.items()}
    base = partial(load_model, base_model, device=device, precision=precision, **context)
    return models | {"base, positions scaled, no adapter": base}


def check_merge(trained: dict, merge: dict, max_perplexity_ratio: float) -> None:
    """Raise :class:`MergeRejected` if a merge is too far above the adapter as trained; see :func:`merge_adapter`."""
    ratio = merge["perplexity"] / trained["perplexity"]
    if not ratio <= max_perplexity_ratio:  # what is not a number is not published either
        raise MergeRejected(
            f"the merge has perplexity {merge['perplexity']:.4g}, the adapter as trained {trained['perplexity']:.4g}: a ratio "
            f"of {ratio:.4g}, above merge.max_perplexity_ratio {max_perplexity_ratio:g}, so it is not published. Is the base "
            "model the one that was trained on? Evaluate the adapter unmerged (merged: false, target perplexity_report), or "
            "raise the ratio."
        )


def keep(folders: dict[str, Path], best: str, output: Path) -> None:
    """Move the files of the best merge up to the output folder and remove the others."""
    for path in folders[best].iterdir():
        path.rename(output / path.name)
    for folder in folders.values():
        shutil.rmtree(folder)
