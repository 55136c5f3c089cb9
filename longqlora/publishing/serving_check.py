"""The serving check: does llama.cpp compute with a GGUF file what transformers computes with the published model?

Three things are compared, each on its own, because each can go wrong without a message:

* the rotary frequencies that the file describes with those of the published ``config.json``;
* the tokens of a text;
* the next-token distributions on held-out training text, in windows of ½, 1 and 2 × the base's context.

Rounding changes distributions, too. :data:`MAX_KL_DIVERGENCE` lies between what a format's rounding does and what wrong
positions do (benchmarks/RESULTS.md has measurements of both).
"""

import copy
import logging
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from transformers import PreTrainedModel

from longqlora.config.settings import GgufFormat
from longqlora.data.packing import load_held_out
from longqlora.data.tokenizers import load_tokenizer
from longqlora.jobs.memory import memory_explained
from longqlora.modeling.loading import load_config, load_model
from longqlora.modeling.rope import context_of
from longqlora.publishing.llama_cpp import TOKENS_PER_BATCH, GgufModel, open_gguf

log = logging.getLogger(__name__)

MAX_KL_DIVERGENCE: dict[GgufFormat, float] = {"f16": 1e-3, "q8_0": 2e-2}  # nats, the mean over a window's positions
MAX_FREQUENCY_DIFFERENCE = 1e-4  # relative; the file has float32
SHARES_OF_CONTEXT = (0.5, 1, 2)  # of the base
MIN_TOKENS = 2048  # of each length, in several windows if they are short
TEXT_TOKENS = 4096  # of the text that both encode
MEMORY_ADVICE = "A machine with more memory: the check holds the model in float32, and the GGUF file."


class ServedDifferently(ValueError):
    """llama.cpp computes something else with a GGUF file than transformers with the model that it was made from."""


def check_serving(*, gguf: str, gguf_format: GgufFormat, model: str, data: str, cards: list[dict]) -> dict:
    """Compare llama.cpp with transformers, both on a CPU.

    Args:
        gguf: the file.
        gguf_format: of its weights.
        model: folder of the published model that it was made from.
        data: training data; the model is compared on their held-out end.
        cards: training cards of the model's stages, in their order, see :func:`longqlora.training.train.train`.

    Returns:
        The record, see :func:`compare`.

    Raises:
        ServedDifferently: if they differ by more than rounding.
        MemoryError: if memory is exhausted.
    """
    base_context, target_context = context_of(load_config(cards[0]["base_model"])), cards[-1]["target_context"]
    lengths = sorted({min(round(share * base_context), target_context) for share in SHARES_OF_CONTEXT})
    held_out, is_held_out = load_held_out(data, max(MIN_TOKENS, *lengths))
    if not is_held_out:
        log.warning("%s: too few data to hold any out; the check reads text that was trained on", data)
    tokens = torch.cat([window["input_ids"] for window in held_out])
    with memory_explained(f"reading {lengths[-1]} tokens at once with {model} in float32", MEMORY_ADVICE):
        compared = compare(gguf, model, tokens, lengths)
    scaling = {key: cards[-1][key] for key in ("rope_scaling", "rope_factor", "rope_theta", "target_context")}
    about = {"format": gguf_format, "base_context": base_context, "held_out": is_held_out}
    record = about | scaling | compared | {"llama_cpp_version": version("llama-cpp-py-sync")}
    if problems := list(differences(record)):
        raise ServedDifferently("\n".join(f"{gguf}: {problem}" for problem in problems))
    return record


def compare(gguf: str, model: str, tokens: torch.Tensor, lengths: list[int]) -> dict:
    """Compare what llama.cpp and transformers compute.

    Args:
        gguf: the file.
        model: folder of the model that it was made from.
        tokens: of a text, ``[n]``.
        lengths: of the windows to compare, in tokens.

    Returns:
        file_bytes; ``frequencies``, see :func:`compare_frequencies`; ``text``, see :func:`compare_tokens`; and ``windows``,
        with the result of :func:`compare_windows` for each length.
    """
    reference = load_model(model, device=torch.device("cpu"), precision="float32").eval()
    record: dict[str, Any] = {"file_bytes": Path(gguf).stat().st_size, "frequencies": compare_frequencies(reference, gguf)}
    log.info("rotary frequencies: %s", record["frequencies"])
    with open_gguf(gguf) as served:
        record["text"] = compare_tokens(load_tokenizer(model), served, tokens[:TEXT_TOKENS])
        record["windows"] = []
        for length in lengths:
            windows = list(tokens[: max(length, MIN_TOKENS)].split(length))
            compared = compare_windows(
                reference, served, [window for window in windows if len(window) == length] or windows[:1]
            )
            record["windows"].append(compared)
            log.info("%s", ", ".join(f"{key} {value:.5g}" for key, value in compared.items()))
    return record


def compare_windows(model: PreTrainedModel, served: GgufModel, windows: list[torch.Tensor]) -> dict[str, float]:
    """Compare the next-token distributions at every position of a text.

    Args:
        model: of transformers, in float32.
        served: the GGUF file.
        windows: tokens, ``[n]`` each.

    Returns:
        window (tokens) and their number; perplexity in transformers and gguf_perplexity in llama.cpp; and the means over the
        positions of the divergence KL(transformers ‖ llama.cpp) in nats, and of the agreement on the most likely token.
    """
    losses, divergences, agreements = [], [], []
    for window in windows:
        ours, theirs = log_probabilities(model, window), served.log_probabilities(window)
        for mine, other, following in zip(ours, theirs, window.roll(-1).split(TOKENS_PER_BATCH), strict=True):
            losses.append(-torch.stack([mine, other]).gather(2, following.expand(2, -1)[..., None])[..., 0])  # [2, positions]
            divergences.append((mine.exp() * (mine - other)).sum(-1))
            agreements.append(mine.argmax(-1) == other.argmax(-1))
    length = len(windows[0])
    nll = torch.cat(losses, 1).view(2, len(windows), length)[..., :-1]  # nothing follows the last token
    perplexity, gguf_perplexity = nll.double().mean((1, 2)).exp().tolist()
    return {
        "window": length,
        "count": len(windows),
        "perplexity": perplexity,
        "gguf_perplexity": gguf_perplexity,
        "kl_divergence": max(0.0, float(torch.cat(divergences).mean())),  # rounding may make it slightly negative
        "top_1_agreement": float(torch.cat(agreements).float().mean()),
    }


@torch.inference_mode()
def log_probabilities(model: PreTrainedModel, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the next-token distributions of a model of transformers; see :meth:`GgufModel.log_probabilities`."""
    hidden = model.base_model(input_ids=tokens[None], use_cache=False).last_hidden_state[0]  # [n, width]
    head = model.get_output_embeddings()
    for states in hidden.split(TOKENS_PER_BATCH):
        yield head(states).float().log_softmax(-1)


def compare_tokens(tokenizer, served: GgufModel, tokens: torch.Tensor) -> dict[str, Any]:
    """Compare the tokens of a text, begin tokens included.

    Args:
        tokenizer: of the published model.
        served: the GGUF file.
        tokens: of the text, ``[n]``.

    Returns:
        characters of the text; ``differs_at``: the text where the tokens first differ, None if they are the same.
    """
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    ours, theirs = tokenizer(text)["input_ids"], served.encode(text)
    first = next((index for index, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    if first is None and len(ours) != len(theirs):
        first = min(len(ours), len(theirs))
    differs_at = None if first is None else tokenizer.decode((ours or theirs)[max(0, first - 2) : first + 6])
    return {"characters": len(text), "differs_at": differs_at}


def compare_frequencies(model: PreTrainedModel, gguf: str) -> dict[str, Any]:
    """Compare the rotary frequencies that a GGUF file describes with those of the model.

    Args:
        model: of transformers.
        gguf: the file.

    Returns:
        ``file``: the scaling that the file has; ``largest_ratio``: the largest ratio of two frequencies, 1 if all are the same;
        ``attention_ratio``: that of the factors on queries and keys (YaRN).
    """
    reader = GGUFReader(gguf)
    rope, config = rope_in_file(reader), copy.deepcopy(model.config)
    config.rope_parameters = dict(rope)
    ours: Any = model.base_model.rotary_emb
    theirs = type(ours)(config)
    frequencies = theirs.inv_freq  # [width of a head / 2]
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":  # llama3's scaling, worked out by the converter
            frequencies = frequencies / torch.from_numpy(tensor.data.copy())
            rope["rope_type"] = "a factor for each frequency"
    ratios = frequencies / ours.inv_freq
    largest = float(torch.maximum(ratios, 1 / ratios).max())
    return {"file": rope, "largest_ratio": largest, "attention_ratio": theirs.attention_scaling / ours.attention_scaling}


def rope_in_file(reader: GGUFReader) -> dict[str, Any]:
    """The scaling in the metadata of a GGUF file, in the keys of transformers; llama.cpp's defaults are the same."""
    keys = {
        "rope.freq_base": "rope_theta",
        "rope.scaling.type": "rope_type",
        "rope.scaling.factor": "factor",
        "rope.scaling.original_context_length": "original_max_position_embeddings",
        "rope.scaling.yarn_beta_fast": "beta_fast",
        "rope.scaling.yarn_beta_slow": "beta_slow",
    }
    architecture = reader.fields["general.architecture"].contents()
    found = {name: reader.fields.get(f"{architecture}.{key}") for key, name in keys.items()}
    rope = {name: field.contents() for name, field in found.items() if field is not None}
    if rope.get("rope_type") == "none":
        del rope["rope_type"]
    return {"rope_theta": 10000.0, "rope_type": "default"} | rope


def differences(record: dict) -> Iterator[str]:
    """Yield how llama.cpp differs from transformers by more than rounding, and what to do.

    Args:
        record: see :func:`check_serving`.
    """
    frequencies, text = record["frequencies"], record["text"]
    ratios = (frequencies["largest_ratio"], frequencies["attention_ratio"])
    if not all(abs(ratio - 1) <= MAX_FREQUENCY_DIFFERENCE for ratio in ratios):
        described = ", ".join(f"{key} {value}" for key, value in frequencies["file"].items())
        yield (
            f"its positions are not those of the model: rotary frequencies differ by a factor of up to {ratios[0]:.4g}, the "
            f"scale of queries and keys by {ratios[1]:.4g} (in the file: {described}). Convert with a current llama.cpp "
            "(serving.converter), or train with rope_scaling: ntk, which every converter reads"
        )
    if text["differs_at"] is not None:
        yield (
            f"llama.cpp reads other tokens than transformers, first in {text['differs_at']!r}: its converter took the "
            "tokenizer for another one. Convert with a current llama.cpp (serving.converter)"
        )
    limit = MAX_KL_DIVERGENCE[record["format"]]
    for window in record["windows"]:
        if not window["kl_divergence"] <= limit:  # also if it is not a number
            yield (
                f"in windows of {window['window']} tokens, next-token distributions differ from those of transformers by a KL "
                f"divergence of {window['kl_divergence']:.3g} nats, more than the {limit:g} that rounding to "
                f"{record['format']} may cause (perplexity {window['gguf_perplexity']:.4g} instead of "
                f"{window['perplexity']:.4g}): do not serve this file"
            )
