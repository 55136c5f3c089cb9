"""Prompts of retrieval tests: something to find in a long text, at a given depth, and a question at the end.

* ``passkey``: a number hidden once (Mohtashami & Jaggi 2023, arXiv 2305.16300), as LongLoRA tests it;
* ``single_needle``, ``multi_key``, ``multi_value``: after RULER's needles (Hsieh et al. 2024, arXiv 2404.06654): a magic number
  of a word; the same among those of other words; several numbers of one word;
* ``induction``: a run of random tokens, whose beginning is repeated at the end and is to be continued. It asks for no
  language, so a very small model can do it.

All is drawn from the seed, the filler is text of the experiment's own evaluation set, and every prompt of a cell has the same
length in tokens. Shapes: a prompt is a list of token ids.
"""

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

TASKS = ("passkey", "single_needle", "multi_key", "multi_value", "induction")
NUM_NEEDLES = 4  # of multi_key and multi_value, as RULER has
WORDS = (
    "amber", "anchor", "basil", "beacon", "birch", "canyon", "cedar", "cobalt", "coral", "cricket", "dune", "ember", "falcon",
    "fennel", "flint", "garnet", "glacier", "harbor", "hazel", "indigo", "ivory", "juniper", "lagoon", "lantern", "maple",
    "meadow", "nectar", "orchid", "pebble", "quartz", "raven", "saffron", "thistle", "tundra", "velvet", "willow",
)  # fmt: skip
SEQUENCE_TOKENS = 16  # of induction
CUE_TOKENS = 8  # of them repeated at the end
ANSWER_TOKENS = 4  # to be continued with
SLACK_TOKENS = 8  # that an answer may be longer than the numbers in it


@dataclass(frozen=True)
class Prompt:
    """One question.

    Attributes:
        ids: token ids of the prompt.
        answers: texts that the answer must have, or, for induction, the token ids that must follow.
    """

    ids: list[int]
    answers: list[str] | list[int]


@dataclass(frozen=True)
class Needles:
    """What is hidden and asked, as text: before the filler, into it, and behind it."""

    instruction: str
    hidden: list[str]
    question: str
    answers: list[str]


def draw_needles(task: str, rng: random.Random) -> Needles:
    """The texts of a passkey or needle question."""
    if task == "passkey":
        key = str(rng.randint(10_000, 99_999))
        return Needles(
            "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about "
            "the important information there.\n",
            [f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"],
            "\nWhat is the pass key? The pass key is",
            [key],
        )
    words = rng.sample(WORDS, NUM_NEEDLES if task == "multi_key" else 1)
    if task == "multi_value":
        words *= NUM_NEEDLES
    values = [str(value) for value in rng.sample(range(1_000_000, 10_000_000), len(words))]
    hidden = [
        f"\nOne of the special magic numbers for {word} is: {value}.\n" for word, value in zip(words, values, strict=True)
    ]
    asked, several = words[0], task == "multi_value"
    subject, verb = ("numbers", "are") if several else ("number", "is")
    return Needles(
        f"Some special magic numbers are hidden within the following text. Make sure to memorize them. I will quiz you about "
        f"the {subject} afterwards.\n",
        hidden,
        f"\nWhat {verb} the special magic {subject} for {asked} mentioned in the provided text? The special magic {subject} "
        f"for {asked} mentioned in the provided text {verb}",
        values if several else values[:1],
    )


def cut_filler(tokens: numpy.ndarray, length: int, rng: random.Random) -> list[int]:
    """Consecutive tokens of the filler from a place at random, from its beginning again where it is too short."""
    start = rng.randrange(len(tokens))
    return numpy.take(tokens, range(start, start + length), mode="wrap").tolist()


def spread(filler: list[int], pieces: Sequence[list[int]], places: Sequence[float]) -> list[int]:
    """Put pieces into the filler, each at a place from 0 (its beginning) to 1 (its end)."""
    ids, done = [], 0
    for place, piece in sorted(zip(places, pieces, strict=True), key=lambda pair: pair[0]):
        cut = round(place * len(filler))
        ids += filler[done:cut] + piece
        done = cut
    return ids + filler[done:]


def prompts_of(
    task: str, *, length: int, depth: float, samples: int, filler: numpy.ndarray, tokenizer, seed: int
) -> tuple[list[Prompt], int]:
    """Prompts of one cell; the same for the same arguments, whatever else is asked.

    Args:
        task: one of :data:`TASKS`.
        length: tokens of the prompt and its answer together.
        depth: where the needle that is asked for lies in the filler, 0 to 1; further ones lie anywhere.
        samples: how many.
        filler: ``[num_tokens]``, token ids of an evaluation set.
        tokenizer: of the model.
        seed: of the experiment.

    Returns:
        The prompts, and the number of tokens that an answer may have.

    Raises:
        ValueError: if the length is too short for the task.
    """
    rng = random.Random(hashlib.sha256(f"{seed} {task} {length} {depth:g}".encode()).digest())
    if task == "induction":
        return [draw_induction(length, depth, filler, rng) for _ in range(samples)], ANSWER_TOKENS
    needles = [draw_needles(task, rng) for _ in range(samples)]

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    budget = SLACK_TOKENS + max(len(encode(" " + ", ".join(texts.answers))) for texts in needles)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompts = []
    for texts in needles:
        head, tail = begin + encode(texts.instruction), encode(texts.question)
        hidden = [encode(text) for text in texts.hidden]
        room = length - budget - len(head) - len(tail) - sum(map(len, hidden))
        if room < 0:
            raise ValueError(f"{length} tokens are too short for the task {task}, which needs at least {length - room}")
        places = [depth] + [rng.random() for _ in hidden[1:]]
        prompts.append(Prompt(head + spread(cut_filler(filler, room, rng), hidden, places) + tail, texts.answers))
    return prompts, budget


def draw_induction(length: int, depth: float, filler: numpy.ndarray, rng: random.Random) -> Prompt:
    """Filler with a run of random tokens in it, and the beginning of that run once more."""
    room = length - SEQUENCE_TOKENS - CUE_TOKENS - ANSWER_TOKENS
    if room < 0:
        raise ValueError(f"{length} tokens are too short for the task induction, which needs at least {length - room}")
    run = [int(filler[rng.randrange(len(filler))]) for _ in range(SEQUENCE_TOKENS)]  # as frequent as in the text
    ids = spread(cut_filler(filler, room, rng), [run], [depth])
    return Prompt(ids + run[:CUE_TOKENS], run[CUE_TOKENS : CUE_TOKENS + ANSWER_TOKENS])


def score_answer(prompt: Prompt, ids: list[int], text: str) -> float:
    """Share of the answers that were found: numbers, standing by themselves, in the text; token ids, all of them or none."""
    if isinstance(prompt.answers[0], int):
        return float(ids[: len(prompt.answers)] == prompt.answers)
    return sum(bool(re.search(rf"(?<!\d){answer}(?!\d)", text)) for answer in prompt.answers) / len(prompt.answers)
