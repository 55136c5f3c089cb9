"""Retrieval accuracy of a system at one context length, by task and by depth in the text."""

import logging
from functools import partial
from itertools import product

import numpy
import torch
from tqdm import tqdm
from transformers import GenerationConfig

from longqlora.config.settings import Device, EvaluatedModel, RetrievalSettings
from longqlora.data.token_files import check_vocabulary, read_tokens
from longqlora.data.tokenizers import load_tokenizer
from longqlora.evaluation.evaluated_model import at_commit, is_within_context, load_evaluated_model, memory_advice
from longqlora.evaluation.retrieval_tasks import (
    PASSAGE_TOKENS,
    UNSCORED_TOKENS,
    Prompt,
    make_prompts,
    make_repetitions,
    score_answer,
)
from longqlora.evaluation.token_losses import NonFiniteLogits, nll_of_batch
from longqlora.jobs.memory import memory_explained
from longqlora.modeling.loading import load_config
from longqlora.modeling.rope import rope_of

log = logging.getLogger(__name__)

TOKENS_PER_BATCH = 8192  # prompt tokens of one batch


@torch.inference_mode()
def answer(model, tokenizer, prompts: list[Prompt], max_new_tokens: int) -> list[float]:
    """Let a model continue prompts of equal length by greedy decoding, and score its answers.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokenizer: tokenizer of the model.
        prompts: prompts with the same number of tokens.
        max_new_tokens: largest number of tokens of an answer.

    Returns:
        The share of its expected answers that were found, for each prompt.
    """
    device = model.get_input_embeddings().weight.device
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        use_cache=not model.config._attn_implementation.startswith("shifted_sparse"),  # which does not support a cache
    )
    length = len(prompts[0].ids)
    rows, scores = max(1, TOKENS_PER_BATCH // length), []
    for first in range(0, len(prompts), rows):
        batch = prompts[first : first + rows]
        ids = torch.tensor([prompt.ids for prompt in batch], device=device)
        new = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)[:, length:].tolist()
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        scores += [score_answer(prompt, text) for prompt, text in zip(batch, texts, strict=True)]
    return scores


def score_repetitions(model, repetitions: list[list[list[int]]]) -> list[float]:
    """Whether a model finds each repeated passage: the repetition has a lower loss than with any other passage in the place of
    the first occurrence.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        repetitions: see :func:`longqlora.evaluation.retrieval_tasks.make_repetitions`.

    Returns:
        1 or 0 for each sample.

    Raises:
        NonFiniteLogits: if a loss is not a number.
    """
    device, num_scored = model.get_input_embeddings().weight.device, PASSAGE_TOKENS - UNSCORED_TOKENS
    scores = []
    for candidates in repetitions:
        texts = torch.tensor(candidates, device=device)
        rows = max(1, TOKENS_PER_BATCH // texts.shape[1])
        parts = [nll_of_batch(model, part, part.shape[1] - 1 - num_scored) for part in texts.split(rows)]
        losses = torch.cat(parts).double().sum(1)
        if not torch.isfinite(losses).all():
            raise NonFiniteLogits("the loss of a repeated passage is not a number (NaN or infinite logits)")
        scores.append(float(losses[0] < losses[1:].min()))  # an equal loss means that the passage made no difference
    return scores


def evaluate_retrieval(
    *, model: EvaluatedModel, tokenizer: str, filler: str, length: int, settings: RetrievalSettings, device: Device
) -> dict:
    """Measure how much a system finds at one context length, for every task and depth.

    Args:
        model: the model of the system.
        tokenizer: directory or hub id of its tokenizer.
        filler: token stream of an evaluation set, see :mod:`longqlora.data.token_files`.
        length: tokens of a prompt and its answer.
        settings: tasks, depths, samples and seed.
        device: ``cpu`` or ``cuda``.

    Returns:
        Model and seed; ``cells``, the share of answers found by task and depth; ``accuracy``, the mean over the cells.

    Raises:
        ValueError: if the length is too short for a task, or the model cannot read it.
    """
    model = at_commit(model)
    is_within = is_within_context(model, length)
    check_vocabulary(filler, load_config(model.path).vocab_size, model.path)
    own_tokenizer = load_tokenizer(tokenizer)
    questions = draw_questions(settings, length, read_tokens(filler), own_tokenizer)
    cells: list[dict] = []
    with memory_explained(*memory_advice(model, length)):
        loaded = load_evaluated_model(model, device, length)
        for (task, depth), asked in tqdm(questions.items(), unit="cell", disable=None):
            scores = score_repetitions(loaded, asked) if task == "induction" else answer(loaded, own_tokenizer, *asked)
            cells.append({"task": task, "depth": depth, "accuracy": sum(scores) / len(scores), "samples": len(scores)})
            log.info("%d tokens, %s at depth %g: %.0f %% found", length, task, depth, 100 * cells[-1]["accuracy"])
    return {
        "precision": model.precision,
        "attention": model.attention,
        "model": model.path,
        "is_within_context": is_within,
        **rope_of(load_config(model.path, model.extension)),
        "seed": settings.seed,
        "cells": cells,
        "accuracy": sum(cell["accuracy"] for cell in cells) / len(cells),
    }


def draw_questions(settings: RetrievalSettings, length: int, filler: numpy.ndarray, tokenizer) -> dict:
    """The questions of every cell by task and depth; drawn before a model is loaded, so that a length that is too short fails
    at once.

    Returns:
        For ``induction`` the texts of :func:`longqlora.evaluation.retrieval_tasks.make_repetitions`, for other tasks what
        :func:`longqlora.evaluation.retrieval_tasks.make_prompts` returns.

    Raises:
        ValueError: if the length is too short for a task.
    """
    questions: dict = {}
    for task, depth in product(settings.tasks, settings.depths):
        draw = make_repetitions if task == "induction" else partial(make_prompts, task, tokenizer=tokenizer)
        questions[task, depth] = draw(length=length, depth=depth, samples=settings.samples, filler=filler, seed=settings.seed)
    return questions
