"""Prompts of retrieval tests: something is hidden in a long text at a given depth, and a question at the end asks for it.

* ``passkey``: one hidden number (Mohtashami & Jaggi 2023, arXiv 2305.16300), as in LongLoRA's test.
* ``single_needle``, ``multi_key``, ``multi_value``: after the needle tests of RULER (Hsieh et al. 2024, arXiv 2404.06654): a
  number that belongs to a word; the same among numbers of other words; several numbers of one word.
* ``induction`` (Olsson et al. 2022, arXiv 2209.11895): a passage occurs in the text and again at its end. The answer is correct
  if the repetition has a lower loss than with any of seven other passages in the place of the first occurrence; guessing is
  right one time in eight. The task needs neither language nor a written answer, so models of a million parameters can solve
  it.

All prompts are drawn from the seed, the surrounding text (filler) comes from an evaluation set of the experiment, and every
prompt of a cell has the same number of tokens. A prompt is a list of token ids.
"""

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the workflow imports this module on every start, so it imports only the standard library
    import numpy

NUM_NEEDLES = 4  # of multi_key and multi_value, as in RULER
WORDS = (
    "amber", "anchor", "basil", "beacon", "birch", "canyon", "cedar", "cobalt", "coral", "cricket", "dune", "ember", "falcon",
    "fennel", "flint", "garnet", "glacier", "harbor", "hazel", "indigo", "ivory", "juniper", "lagoon", "lantern", "maple",
    "meadow", "nectar", "orchid", "pebble", "quartz", "raven", "saffron", "thistle", "tundra", "velvet", "willow",
)  # fmt: skip
PASSAGE_TOKENS = 28  # length of the repeated passage of induction
UNSCORED_TOKENS = 4  # first tokens of the repetition, from which a model recognizes the passage that follows
NUM_CANDIDATES = 8  # passages of induction, one of which is repeated
SLACK_TOKENS = 8  # tokens that an answer may have besides each number it is asked for: chat models write numbered lists


@dataclass(frozen=True)
class Prompt:
    """One question: the token ids of the prompt, and the numbers that a correct answer contains."""

    ids: list[int]
    answers: list[str]


@dataclass(frozen=True)
class Needles:
    """The texts of one question.

    Attributes:
        instruction: comes before the filler.
        hidden: needles to insert into the filler; the first one is asked for.
        question: comes after the filler.
        answer_prefix: how the answer begins; the model continues it.
        answers: numbers that a correct answer contains.
    """

    instruction: str
    hidden: list[str]
    question: str
    answer_prefix: str
    answers: list[str]


def draw_needles(task: str, rng: random.Random) -> Needles:
    """The texts of a passkey or needle question."""
    if task == "passkey":
        key = str(rng.randint(10_000, 99_999))
        return Needles(
            "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about "
            "the important information there.\n",
            [f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"],
            "\nWhat is the pass key?",
            "The pass key is",
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
    subject, verb, every = ("numbers", "are", "all ") if several else ("number", "is", "")
    return Needles(
        f"Some special magic numbers are hidden within the following text. Make sure to memorize them. I will quiz you about "
        f"the {subject} afterwards.\n",
        hidden,
        f"\nWhat {verb} {every}the special magic {subject} for {asked} mentioned in the provided text?",
        f"The special magic {subject} for {asked} mentioned in the provided text {verb}",
        values if several else values[:1],
    )


def plain_frame(tokenizer, needles: Needles) -> tuple[list[int], list[int]]:
    """The token ids before and after the filler in a plain prompt, which any model can continue."""
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    instruction, question = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (needles.instruction, f"{needles.question} {needles.answer_prefix}")
    )
    return begin + instruction, question


def cut_filler(tokens: "numpy.ndarray", length: int, rng: random.Random) -> list[int]:
    """``length`` consecutive tokens of the filler from a random position; after its last token it starts over."""
    ids: list[int] = []
    start = rng.randrange(len(tokens))
    while len(ids) < length:
        ids += map(int, tokens[start : start + length - len(ids)])
        start = 0
    return ids


def insert_at_depths(filler: list[int], pieces: Sequence[list[int]], depths: Sequence[float]) -> list[int]:
    """Insert each piece into the filler at its depth, from 0 (the beginning) to 1 (the end)."""
    ids: list[int] = []
    done = 0
    for depth, piece in sorted(zip(depths, pieces, strict=True), key=lambda pair: pair[0]):
        cut = round(depth * len(filler))
        ids += filler[done:cut] + piece
        done = cut
    return ids + filler[done:]


def cell_rng(seed: int, task: str, length: int, depth: float) -> random.Random:
    """Random numbers of one cell, independent of which other cells there are; a depth of 1 and one of 1.0 are the same."""
    cell = f"{seed} {task} {length} {int(depth) if depth == int(depth) else depth}"
    return random.Random(hashlib.sha256(cell.encode()).digest())


def make_prompts(
    task: str,
    *,
    length: int,
    depth: float,
    samples: int,
    filler: "numpy.ndarray",
    tokenizer,
    seed: int,
    frame: Callable[..., tuple[list[int], list[int]]] = plain_frame,
) -> tuple[list[Prompt], int]:
    """Prompts of a passkey or needle cell.

    Args:
        task: passkey, single_needle, multi_key or multi_value.
        length: tokens of the prompt and its answer together.
        depth: where in the filler the needle lies that the question asks for, 0 to 1; the others lie at random depths.
        samples: number of prompts.
        filler: ``[num_tokens]``, token ids of an evaluation set.
        tokenizer: tokenizer of the model.
        seed: seed of the experiment.
        frame: from the tokenizer and the texts of a question to the token ids before and after the filler.

    Returns:
        The prompts, and the largest number of tokens of an answer.

    Raises:
        ValueError: if the length is too short for the task.
    """
    rng = cell_rng(seed, task, length, depth)
    needles = [draw_needles(task, rng) for _ in range(samples)]

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    max_new_tokens = max(SLACK_TOKENS * len(texts.answers) + len(encode(" " + ", ".join(texts.answers))) for texts in needles)
    prompts = []
    for texts in needles:
        head, tail = frame(tokenizer, texts)
        hidden = [encode(text) for text in texts.hidden]
        needed = max_new_tokens + len(head) + len(tail) + sum(map(len, hidden))
        num_filler = filler_length(length, needed, task)
        depths = [depth] + [rng.random() for _ in hidden[1:]]
        ids = head + insert_at_depths(cut_filler(filler, num_filler, rng), hidden, depths) + tail
        prompts.append(Prompt(ids, texts.answers))
    return prompts, max_new_tokens


def filler_length(length: int, needed: int, task: str) -> int:
    """Number of filler tokens in a prompt of ``length`` tokens, of which ``needed`` are taken.

    Raises:
        ValueError: if the length is too short for the task.
    """
    if needed > length:
        raise ValueError(f"retrieval.lengths: {length} tokens are too short for the task {task}, which needs at least {needed}")
    return length - needed


def make_repetitions(*, length: int, depth: float, samples: int, filler: "numpy.ndarray", seed: int) -> list[list[list[int]]]:
    """Texts of an induction cell: token ids, ``[samples, NUM_CANDIDATES, length]``.

    All texts of a sample end in the same passage and differ only in the passage at ``depth``: in the first text it is the one
    at the end, in the others another one.

    Args:
        length, depth, samples, filler, seed: see :func:`make_prompts`.

    Raises:
        ValueError: if the length is too short.
    """
    rng = cell_rng(seed, "induction", length, depth)
    num_filler = filler_length(length, 2 * PASSAGE_TOKENS, "induction")
    repetitions = []
    for _ in range(samples):
        around = cut_filler(filler, num_filler, rng)
        passages = [cut_filler(filler, PASSAGE_TOKENS, rng) for _ in range(NUM_CANDIDATES)]
        repetitions.append([insert_at_depths(around, [passage], [depth]) + passages[0] for passage in passages])
    return repetitions


def score_answer(prompt: Prompt, text: str) -> float:
    """Share of the expected numbers that occur in a text, not as a part of a longer number."""
    return sum(bool(re.search(rf"(?<!\d){answer}(?!\d)", text)) for answer in prompt.answers) / len(prompt.answers)
