"""The merge certificate: the adapter as it was trained, its merges and the base without it, compared on a sample of text.

Perplexity decides which merge is published. How far each model is from the one that was trained is shown by the divergence of
their next-token distributions, KL(trained ‖ model) in nats, and by how often both find the same token most likely.
"""

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from peft import PeftModel

from longqlora.estimates import mean_nll
from longqlora.merging import merge_weights, save_tokenizer
from longqlora.model_card import model_card
from longqlora.models import find_device, load_config, load_model, name_of, resident_dtype, stored_dtype
from longqlora.perplexity import score
from longqlora.protocols import lay_windows
from longqlora.tokens import read_tokens

log = logging.getLogger(__name__)

SAMPLE_TOKENS = 16384  # that perplexity is measured on, at least one window
LOGIT_POSITIONS = 512  # spread over the sample, whose distributions are compared
MERGES = {"16-bit": False, "NF4 round trip": True}


@torch.inference_mode()
def log_probabilities(model, tokens: numpy.ndarray, window: int) -> torch.Tensor:
    """Logarithms of the next-token distributions at ``LOGIT_POSITIONS`` places spread evenly over windows of a text.

    Returns:
        ``[positions, vocabulary]``, float32 on the CPU.
    """
    device = model.get_input_embeddings().weight.device
    starts = range(0, len(tokens) - 1, window)
    every = max(1, len(tokens) // LOGIT_POSITIONS)
    rows = []
    for start in starts:
        ids = torch.from_numpy(tokens[start : start + window].astype("int64"))[None].to(device)
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, every - 1 :: every]
        rows.append(model.get_output_embeddings()(hidden).float().log_softmax(-1).cpu())
    return torch.cat(rows)


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


def certify(models: dict[str, Callable], tokens: numpy.ndarray, window: int) -> dict[str, dict[str, float]]:
    """Measure models one after the other on the same text; the first is the one that the others are compared with.

    Args:
        models: for each a function that loads it, so that one at a time is in memory.
        tokens: ``[num_tokens]``
        window: in tokens; the stride is the same.

    Returns:
        By model: mean_nll (nats), standard_error (None for a single window), perplexity, and what :func:`compare` returns.
    """
    measured, trained = {}, None
    for name, load in models.items():
        model = load().eval()
        by_window, _ = score(model, tokens, lay_windows("exact", [len(tokens)], window, window))
        result, _ = mean_nll(by_window, {"protocol": "exact"})
        rows = log_probabilities(model, tokens, window)
        trained = rows if trained is None else trained
        measured[name] = {
            "mean_nll": result.mean,
            "standard_error": result.standard_error,
            "perplexity": math.exp(result.mean),
            **compare(trained, rows),
        }
        known = {key: value for key, value in measured[name].items() if value is not None}
        log.info("%s: %s", name, ", ".join(f"{key} {value:.5g}" for key, value in known.items()))
        del model
    return measured


def deployed_precision(base_model: str, device: torch.device) -> str:
    """The precision to compare unquantised models in: the GPU's; on a CPU bfloat16, unless the base is stored in float32."""
    if device.type == "cuda":
        return name_of(resident_dtype(device))
    return "float32" if stored_dtype(load_config(base_model)) is torch.float32 else "bfloat16"


def merge_adapter(
    *,
    base_model: str,
    adapter: str,
    output: str,
    label: str,
    card: dict,
    sample: str,
    device: str,
) -> dict:
    """Merge an adapter in each way that fits how it was trained, measure the merges, and publish the better one.

    The folder gets the model with its rope scaling and generation configuration, the tokenizer with its new length, a model
    card, and the certificate (``merge_certificate.json``).

    Args:
        base_model: directory or hub id that the adapter was trained on.
        adapter: folder of the adapter, in peft's format.
        output: folder of the merged model.
        label: of the system.
        card: the training card, see :func:`longqlora.training.train`.
        sample: token file of an evaluation set, of whose beginning the merges are measured.
        device: ``cpu`` or ``cuda``.

    Returns:
        The certificate.
    """
    where, window = find_device(device), card["context_length"]
    context = {"context_length": window, "rope_type": card["rope_scaling"]}
    quantised = card["settings"]["method"] == "qlora"
    precision = deployed_precision(base_model, where)
    merges = {name: from_nf4 for name, from_nf4 in MERGES.items() if quantised or not from_nf4}
    folders = {name: Path(output) / f"merge-{number}" for number, name in enumerate(merges)}
    for name, from_nf4 in merges.items():
        config = load_config(base_model, **context)
        merge_weights(base_model, adapter, folders[name], config=config, from_nf4=from_nf4, device=where, context_length=window)

    def load(path: str, precision: str = precision, **context):
        return load_model(str(path), device=where, precision=precision, **context)

    def load_trained():
        base = load(base_model, "nf4" if quantised else precision, **context)
        return PeftModel.from_pretrained(base, adapter).base_model.model  # the layers are those with the adapter in them

    trained = f"adapter on the {'NF4' if quantised else '16-bit'} base, as trained"
    models = {trained: load_trained}
    models |= {f"merge: {name}": lambda folder=folder: load(folder) for name, folder in folders.items()}
    models["base, positions scaled, no adapter"] = lambda: load(base_model, **context)
    tokens = numpy.array(read_tokens(sample)[: max(SAMPLE_TOKENS, window) + 1])
    measured = certify(models, tokens, window)
    best = min(merges, key=lambda name: measured[f"merge: {name}"]["mean_nll"])
    publish(folders, best, Path(output))
    save_tokenizer(base_model, output, context_length=window, is_chat_model=card["settings"]["data"] == "sft")
    certificate = {
        "published": f"merge: {best}",
        "sample": {"tokens": len(tokens), "window": window, "path": sample},
        "precision": {"trained": "nf4" if quantised else precision, "others": precision},
        "models": measured,
    }
    (Path(output) / "merge_certificate.json").write_text(json.dumps(certificate, indent=2))
    (Path(output) / "README.md").write_text(model_card(label, card, certificate), encoding="utf-8")
    return certificate


def publish(folders: dict[str, Path], best: str, output: Path) -> None:
    """Move the files of the best merge up to the output folder and remove the others."""
    for path in folders[best].iterdir():
        path.rename(output / path.name)
    for folder in folders.values():
        shutil.rmtree(folder)
