"""Retrieval accuracy of a system at a context length: what it finds again, by task and by depth in the text."""

import logging

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig

from longqlora.data.token_files import read_tokens
from longqlora.evaluation.evaluated_model import EvaluatedModel
from longqlora.evaluation.perplexity import NonFiniteLogits, nll_of_batch
from longqlora.evaluation.retrieval_tasks import (
    CUE_TOKENS,
    PASSAGE_TOKENS,
    Prompt,
    make_prompts,
    make_repetitions,
    score_answer,
)
from longqlora.jobs.memory import memory_explained
from longqlora.modeling.devices import find_device
from longqlora.modeling.rope import rope_of

log = logging.getLogger(__name__)

TOKENS_PER_BATCH = 8192  # of the prompts that are answered at once


@torch.inference_mode()
def answer(model, tokenizer, prompts: list[Prompt], max_new_tokens: int) -> list[float]:
    """Let a model continue prompts of equal length, greedily, and score each.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokenizer: of the model.
        prompts: all of the same number of tokens.
        max_new_tokens: longest answer.

    Returns:
        For each prompt the share of its answers that were found.
    """
    device = model.get_input_embeddings().weight.device
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        use_cache=not model.config._attn_implementation.startswith("shifted_sparse"),  # which takes no cache
    )
    length = len(prompts[0].ids)
    rows, scores = max(1, TOKENS_PER_BATCH // length), []
    for first in range(0, len(prompts), rows):
        batch = prompts[first : first + rows]
        ids = torch.tensor([prompt.ids for prompt in batch], device=device)
        new = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)[:, length:].tolist()
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        scores += [score_answer(*given) for given in zip(batch, texts, strict=True)]
    return scores


def recognise(model, repetitions: list[list[list[int]]]) -> list[float]:
    """Whether a model finds each repeated passage: its tokens are likelier after itself than after any other.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        repetitions: of :func:`longqlora.evaluation.retrieval_tasks.make_repetitions`.

    Returns:
        1 or 0 for each.

    Raises:
        NonFiniteLogits: if a loss is not a number.
    """
    device, counted = model.get_input_embeddings().weight.device, PASSAGE_TOKENS - CUE_TOKENS
    scores = []
    for choices in repetitions:
        texts = torch.tensor(choices, device=device)
        rows = max(1, TOKENS_PER_BATCH // texts.shape[1])
        parts = [nll_of_batch(model, part, part.shape[1] - 1 - counted) for part in texts.split(rows)]
        losses = torch.cat(parts).double().sum(1)
        if not torch.isfinite(losses).all():
            raise NonFiniteLogits("the loss of a repeated passage is not a number (NaN or infinite logits)")
        scores.append(float(losses[0] < losses[1:].min()))  # equal losses are no sign of having seen it
    return scores


def evaluate_retrieval(
    *, model: dict, tokenizer: str, filler: str, tasks: list[str], length: int, depths: list[float], samples: int, seed: int,
    device: str,
) -> dict:  # fmt: skip
    """Ask a system all questions of a context length.

    Args:
        model: fields of :class:`longqlora.evaluation.evaluated_model.EvaluatedModel`.
        tokenizer: directory or hub id.
        filler: ``.bin`` file of an evaluation set.
        tasks: see :mod:`longqlora.evaluation.retrieval_tasks`.
        length: tokens of a prompt and its answer.
        depths: where the needles lie, 0 to 1.
        samples: prompts of each task and depth.
        seed: of the experiment.
        device: ``cpu`` or ``cuda``.

    Returns:
        The protocol; by task and depth the share of answers found (``cells``); and their mean (``accuracy``).

    Raises:
        ValueError: if the length is too short for a task, or the model cannot take it.
    """
    evaluated = EvaluatedModel(**model)
    is_within_context = evaluated.check_window(length)
    pieces, drawing = AutoTokenizer.from_pretrained(tokenizer), {"length": length, "samples": samples, "seed": seed}
    drawing["filler"] = read_tokens(filler)

    def draw(task: str, depth: float):
        if task == "induction":
            return make_repetitions(depth=depth, **drawing)
        return make_prompts(task, depth=depth, tokenizer=pieces, **drawing)

    asked = {(task, depth): draw(task, depth) for task in tasks for depth in depths}  # what cannot be asked fails here
    cells = []
    with memory_explained(*evaluated.memory_advice(length)):
        loaded = evaluated.load(find_device(device), length)
        for (task, depth), questions in tqdm(asked.items(), unit="cell", disable=None):
            scores = recognise(loaded, questions) if task == "induction" else answer(loaded, pieces, *questions)
            cells.append({"task": task, "depth": depth, "accuracy": sum(scores) / len(scores), "samples": len(scores)})
            log.info("%d tokens, %s at depth %g: %.0f %% found", length, task, depth, 100 * cells[-1]["accuracy"])
    return {
        "precision": evaluated.precision,
        "attention": evaluated.attention,
        "model": evaluated.path,
        "is_within_context": is_within_context,
        **rope_of(evaluated.config()),
        "seed": seed,
        "cells": cells,
        "accuracy": sum(cell["accuracy"] for cell in cells) / len(cells),
    }
