"""Retrieval accuracy of a system at one context length, by task and by depth in the text."""

import logging
from functools import partial
from itertools import product

import numpy
import torch
from tqdm import tqdm
from transformers import GenerationConfig

from longqlora.config.settings import Device, EvaluatedModel, RetrievalSettings
from longqlora.data.chat_template import tokenize_question, with_chat_template
from longqlora.data.hub import pinned_model
from longqlora.data.token_files import check_vocabulary, read_tokens
from longqlora.data.tokenizers import load_tokenizer
from longqlora.evaluation.evaluated_model import at_commit, is_within_context, load_evaluated_model, memory_advice
from longqlora.evaluation.retrieval_tasks import (
    PASSAGE_TOKENS,
    UNSCORED_TOKENS,
    Needles,
    Prompt,
    make_prompts,
    make_repetitions,
    plain_frame,
    score_answer,
)
from longqlora.evaluation.token_losses import NonFiniteLogits, nll_of_batch
from longqlora.jobs.memory import memory_explained
from longqlora.modeling.generation_settings import stop_tokens
from longqlora.modeling.loading import load_config
from longqlora.modeling.rope import rope_of

log = logging.getLogger(__name__)

TOKENS_PER_BATCH = 8192  # of the texts of one induction batch
CACHE_SHARE = 0.25  # of the free memory of a GPU, for the cache of a batch of prompts; activations need memory too
CACHE_BYTES = 2**30  # of that cache on a CPU


def prompts_per_batch(model, length: int) -> int:
    """How many prompts of ``length`` tokens a model continues at once: as many as its cache of keys and values has memory for.

    A new token takes a GPU hardly longer for ten prompts than for one.
    """
    config, weight = model.config.get_text_config(), model.get_input_embeddings().weight
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_per_token = 2 * config.num_hidden_layers * heads * width * weight.dtype.itemsize
    memory: float = CACHE_BYTES
    if weight.device.type == "cuda":
        unused = torch.cuda.memory_reserved(weight.device) - torch.cuda.memory_allocated(weight.device)  # kept for reuse
        memory = CACHE_SHARE * (torch.cuda.mem_get_info(weight.device)[0] + unused)
    return max(1, int(memory // (bytes_per_token * length)))


@torch.inference_mode()
def answer(model, tokenizer, prompts: list[Prompt], max_new_tokens: int, stop: list[int]) -> list[str]:
    """Let a model continue prompts of equal length by greedy decoding.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokenizer: tokenizer of the model.
        prompts: prompts with the same number of tokens.
        max_new_tokens: largest number of tokens of an answer.
        stop: tokens that end an answer.

    Returns:
        The answer to each prompt.
    """
    device = model.get_input_embeddings().weight.device
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=stop[0],
        use_cache=not model.config._attn_implementation.startswith("shifted_sparse"),  # which does not support a cache
    )
    length = len(prompts[0].ids)
    rows, texts = prompts_per_batch(model, length + max_new_tokens), []
    for first in range(0, len(prompts), rows):
        ids = torch.tensor([prompt.ids for prompt in prompts[first : first + rows]], device=device)
        new = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)[:, length:].tolist()
        texts += tokenizer.batch_decode(new, skip_special_tokens=True)
    return texts


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


def measure_cell(model, tokenizer, task: str, questions, stop: list[int]) -> dict:
    """Put the questions of a cell to a model.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokenizer: tokenizer of the model.
        task: see :mod:`longqlora.evaluation.retrieval_tasks`.
        questions: of this cell, see :func:`draw_questions`.
        stop: tokens that end an answer.

    Returns:
        ``accuracy`` and ``samples``; unless the task is induction also ``answers``, for each prompt the numbers that were
        expected, the answer, and its score.
    """
    if task == "induction":
        scores = score_repetitions(model, questions)
        return {"accuracy": sum(scores) / len(scores), "samples": len(scores)}
    prompts, max_new_tokens = questions
    answers = [
        {"expected": prompt.answers, "answer": text.strip(), "score": score_answer(prompt, text)}
        for prompt, text in zip(prompts, answer(model, tokenizer, prompts, max_new_tokens, stop), strict=True)
    ]
    return {"accuracy": sum(one["score"] for one in answers) / len(answers), "samples": len(answers), "answers": answers}


def evaluate_retrieval(
    *,
    model: EvaluatedModel,
    untrained: str,
    tokenizer: str,
    is_trained_to_answer: bool,
    filler: str,
    length: int,
    settings: RetrievalSettings,
    device: Device,
) -> dict:
    """Measure how much a system finds at one context length, for every task and depth.

    Args:
        model: the model of the system.
        untrained: directory or hub id of the model before any training of this experiment, for the tokens that end an answer.
        tokenizer: directory or hub id of the system's tokenizer.
        is_trained_to_answer: the system was trained on instructions, with the chat template for training.
        filler: token stream of an evaluation set, see :mod:`longqlora.data.token_files`.
        length: tokens of a prompt and its answer.
        settings: tasks, depths, samples, seed, and whether a chat template is used.
        device: ``cpu`` or ``cuda``.

    Returns:
        Model and seed; ``chat_template``, whether the questions were written with one; ``cells``, by task and depth the share
        of answers found and the answers; ``accuracy``, the mean over the cells.

    Raises:
        ValueError: if the length is too short for a task, the model cannot read it, or the chat template writes no question.
    """
    model = at_commit(model)
    is_within = is_within_context(model, length)
    check_vocabulary(filler, load_config(model.path).vocab_size, model.path)
    own_tokenizer = load_tokenizer(tokenizer)
    if is_trained_to_answer:
        with_chat_template(own_tokenizer)
    questions = draw_questions(settings, length, read_tokens(filler), own_tokenizer)
    stop = stop_tokens(pinned_model(untrained), own_tokenizer)
    cells: list[dict] = []
    with memory_explained(*memory_advice(model, length)):
        loaded = load_evaluated_model(model, device, length)
        loaded.generation_config = GenerationConfig()  # a model's own may punish repetitions, and an answer is one
        for (task, depth), asked in tqdm(questions.items(), unit="cell", disable=None):
            cells.append({"task": task, "depth": depth, **measure_cell(loaded, own_tokenizer, task, asked, stop)})
            log.info("%d tokens, %s at depth %g: %.0f %% found", length, task, depth, 100 * cells[-1]["accuracy"])
    return {
        "precision": model.precision,
        "attention": model.attention,
        "model": model.path,
        "is_within_context": is_within,
        **rope_of(load_config(model.path, model.extension)),
        "seed": settings.seed,
        "chat_template": uses_chat_template(settings, own_tokenizer),
        "cells": cells,
        "accuracy": sum(cell["accuracy"] for cell in cells) / len(cells),
    }


def uses_chat_template(settings: RetrievalSettings, tokenizer) -> bool:
    """Whether questions are written with the chat template: there is one, and induction is not the only task."""
    return settings.chat_template and bool(tokenizer.chat_template) and set(settings.tasks) != {"induction"}


def chat_frame(tokenizer, needles: Needles) -> tuple[list[int], list[int]]:
    """The token ids before and after the filler in a prompt for a chat model: its template, and the begin of its answer."""
    return tokenize_question(tokenizer, needles.instruction, needles.question, needles.answer_prefix)


def draw_questions(settings: RetrievalSettings, length: int, filler: numpy.ndarray, tokenizer) -> dict:
    """The questions of every cell by task and depth; drawn before a model is loaded, so that a length that is too short fails
    at once.

    Returns:
        For ``induction`` the texts of :func:`longqlora.evaluation.retrieval_tasks.make_repetitions`, for other tasks what
        :func:`longqlora.evaluation.retrieval_tasks.make_prompts` returns.

    Raises:
        ValueError: if the length is too short for a task, or the chat template writes no question.
    """
    special = [token for token, known in tokenizer.added_tokens_decoder.items() if known.special]
    text = filler[~numpy.isin(filler, special)]  # the end of a document could end the question
    frame = chat_frame if uses_chat_template(settings, tokenizer) else plain_frame
    ask = partial(make_prompts, filler=text, tokenizer=tokenizer, frame=frame)
    repeat = partial(make_repetitions, filler=filler)
    questions: dict = {}
    for task, depth in product(settings.tasks, settings.depths):
        draw = repeat if task == "induction" else partial(ask, task)
        questions[task, depth] = draw(length=length, depth=depth, samples=settings.samples, seed=settings.seed)
    return questions
