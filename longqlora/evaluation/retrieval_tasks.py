"""Prompts of retrieval tests: something to find in a long text, at a given depth, and a question at the end.

* ``passkey``: a number hidden once (Mohtashami & Jaggi 2023, arXiv 2305.16300), as LongLoRA tests it;
* ``single_needle``, ``multi_key``, ``multi_value``: after RULER's needles (Hsieh et al. 2024, arXiv 2404.06654): a magic number
  of a word; the same among those of other words; several numbers of one word;
* ``induction`` (Olsson et al. 2022, arXiv 2209.11895): a passage that stands at the end of the text once more. It is found if
  the repetition surprises the model less than after any of seven other passages in the place of the first: chance finds one
  in eight. It asks for no language and no answer, so a model of a million parameters can do it.

All is drawn from the seed, the filler is text of the experiment's own evaluation set, and every prompt of a cell has the same
length in tokens. Shapes: a prompt is a list of token ids.
"""

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

NUM_NEEDLES = 4  # of multi_key and multi_value, as RULER has
WORDS = (
    "amber", "anchor", "basil", "beacon", "birch", "canyon", "cedar", "cobalt", "coral", "cricket", "dune", "ember", "falcon",
    "fennel", "flint", "garnet", "glacier", "harbor", "hazel", "indigo", "ivory", "juniper", "lagoon", "lantern", "maple",
    "meadow", "nectar", "orchid", "pebble", "quartz", "raven", "saffron", "thistle", "tundra", "velvet", "willow",
)  # fmt: skip
PASSAGE_TOKENS = 28  # of induction
CUE_TOKENS = 4  # of the repetition, that do not count: they follow different words
CHOICES = 8  # passages, one of which is repeated
SLACK_TOKENS = 8  # that an answer may be longer than the numbers in it


@dataclass(frozen=True)
class Prompt:
    """One question: the token ids of the prompt, and texts that the answer must have."""

    ids: list[int]
    answers: list[str]


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


def cut_filler(tokens: Sequence[int], length: int, rng: random.Random) -> list[int]:
    """Consecutive tokens of the filler from a place at random, from its beginning again where it is too short."""
    start, found = rng.randrange(len(tokens)), []
    while len(found) < length:
        found += map(int, tokens[start : start + length - len(found)])
        start = 0
    return found


def insert_at_depths(filler: list[int], pieces: Sequence[list[int]], places: Sequence[float]) -> list[int]:
    """Put pieces into the filler, each at a place from 0 (its beginning) to 1 (its end)."""
    ids, done = [], 0
    for place, piece in sorted(zip(places, pieces, strict=True), key=lambda pair: pair[0]):
        cut = round(place * len(filler))
        ids += filler[done:cut] + piece
        done = cut
    return ids + filler[done:]


def cell_rng(*drawn: object) -> random.Random:
    """Random numbers of a cell, the same whatever other cells there are."""
    return random.Random(hashlib.sha256(" ".join(map(str, drawn)).encode()).digest())


def make_prompts(
    task: str, *, length: int, depth: float, samples: int, filler: Sequence[int], tokenizer, seed: int
) -> tuple[list[Prompt], int]:
    """Prompts of a passkey or needle cell.

    Args:
        task: passkey, single_needle, multi_key or multi_value.
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
    rng = cell_rng(seed, task, length, depth)
    needles = [draw_needles(task, rng) for _ in range(samples)]

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    budget = SLACK_TOKENS + max(len(encode(" " + ", ".join(texts.answers))) for texts in needles)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompts = []
    for texts in needles:
        head, tail = begin + encode(texts.instruction), encode(texts.question)
        hidden = [encode(text) for text in texts.hidden]
        room = filler_length(length, budget + len(head) + len(tail) + sum(map(len, hidden)), task)
        places = [depth] + [rng.random() for _ in hidden[1:]]
        prompts.append(Prompt(head + insert_at_depths(cut_filler(filler, room, rng), hidden, places) + tail, texts.answers))
    return prompts, budget


def filler_length(length: int, needed: int, task: str) -> int:
    """Tokens left for filler."""
    if needed > length:
        raise ValueError(f"retrieval.lengths: {length} tokens are too short for the task {task}, which needs at least {needed}")
    return length - needed


def make_repetitions(*, length: int, depth: float, samples: int, filler: Sequence[int], seed: int) -> list[list[list[int]]]:
    """Texts of an induction cell: ``[samples, CHOICES, length]``, token ids. Those of a sample differ in the passage at
    ``depth`` alone; the first has the one there that stands at the end of all.

    Args:
        length, depth, samples, filler, seed: see :func:`make_prompts`.

    Raises:
        ValueError: if the length is too short.
    """
    rng = cell_rng(seed, "induction", length, depth)
    room, found = filler_length(length, 2 * PASSAGE_TOKENS, "induction"), []
    for _ in range(samples):
        around = cut_filler(filler, room, rng)
        passages = [cut_filler(filler, PASSAGE_TOKENS, rng) for _ in range(CHOICES)]
        found.append([insert_at_depths(around, [passage], [depth]) + passages[0] for passage in passages])
    return found


def score_answer(prompt: Prompt, text: str) -> float:
    """Share of the answers, numbers that stand by themselves, that were found."""
    return sum(bool(re.search(rf"(?<!\d){answer}(?!\d)", text)) for answer in prompt.answers) / len(prompt.answers)
