import random
import re
from itertools import groupby, pairwise

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longqlora.evaluation.retrieval_tasks import (
    NUM_CANDIDATES,
    NUM_NEEDLES,
    PASSAGE_TOKENS,
    Prompt,
    cut_filler,
    insert_at_depths,
    make_prompts,
    make_repetitions,
    score_answer,
)

TASKS = ("passkey", "single_needle", "multi_key", "multi_value")
NUM_HIDDEN = {"passkey": 1, "single_needle": 1, "multi_key": NUM_NEEDLES, "multi_value": NUM_NEEDLES}
HIDDEN = re.compile(r"\n(?:The pass key is (\d+)\. Remember it|One of the special magic numbers for (\w+) is: (\d+)\.)")


@pytest.fixture(scope="module")
def filler(texts, tokenizer) -> numpy.ndarray:
    return numpy.array(tokenizer(texts[0] + texts[1], add_special_tokens=False)["input_ids"], dtype="uint16")


@pytest.fixture
def draw(filler, tokenizer):
    def prompts(task: str, **changes):
        usual = {"length": 600, "depth": 0.5, "samples": 4, "filler": filler, "tokenizer": tokenizer, "seed": 1}
        return make_prompts(task, **{**usual, **changes})

    return prompts


@pytest.mark.parametrize("task", TASKS)
def test_the_same_arguments_draw_the_same_prompts_and_others_others(draw, task):
    assert draw(task) == draw(task)
    assert draw(task) != draw(task, seed=2)
    assert draw(task)[0][0] != draw(task)[0][1]


def test_a_cell_is_the_same_whatever_else_is_asked(draw):
    alone = draw("single_needle", depth=0.25)
    everything = {(task, depth): draw(task, depth=depth) for task in TASKS for depth in (0, 0.25, 1)}
    assert everything["single_needle", 0.25] == alone


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [400, 601])
def test_a_prompt_and_its_longest_answer_fill_the_length_exactly(draw, tokenizer, task, length):
    prompts, budget = draw(task, length=length)
    for prompt in prompts:
        assert len(prompt.ids) == length - budget
        assert all(type(index) is int for index in prompt.ids)
        assert len(tokenizer(" " + ", ".join(prompt.answers), add_special_tokens=False)["input_ids"]) < budget


@pytest.mark.parametrize("task", TASKS)
def test_all_needles_stand_in_the_text_and_the_question_asks_for_the_answer(draw, tokenizer, task):
    for prompt in draw(task, length=700)[0]:
        text = tokenizer.decode(prompt.ids)
        found = [(word, key or value) for key, word, value in HIDDEN.findall(text)]
        assert len(found) == len({value for _, value in found}) == NUM_HIDDEN[task]
        question = text.rsplit("\n", 1)[1]
        asked = {value for word, value in found if word in question}
        assert asked == set(prompt.answers)
        assert len({word for word, _ in found}) == (NUM_NEEDLES if task == "multi_key" else 1)
        assert not any(answer in question for answer in prompt.answers)


def test_an_integer_depth_draws_the_same_prompts_as_a_float(draw, repeat):
    assert draw("multi_key", depth=1) == draw("multi_key", depth=1.0)
    assert repeat(depth=0) == repeat(depth=0.0)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("depth", [0, 0.25, 0.5, 1])
def test_the_needle_that_is_asked_for_lies_at_the_depth(draw, tokenizer, task, depth):
    end = tokenizer.eos_token_id  # a filler that is in no other part of the prompt
    for prompt in draw(task, depth=depth, filler=numpy.array([end]))[0]:
        before = 0
        for is_filler, run in groupby(prompt.ids, key=end.__eq__):
            ids = list(run)
            if is_filler:
                before += len(ids)
            elif prompt.answers[0] in tokenizer.decode(ids):
                break
        assert before == round(depth * prompt.ids.count(end))


@given(size=st.integers(0, 60), places=st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_pieces_are_spread_to_their_places_and_the_filler_stays_whole(size, places):
    filler, pieces = list(range(size)), [[-number, -number] for number in range(1, len(places) + 1)]
    ids = insert_at_depths(filler, pieces, places)
    assert [index for index in ids if index >= 0] == filler
    for place, piece in zip(places, pieces, strict=True):
        at = ids.index(piece[0])
        assert ids[at : at + 2] == piece
        assert sum(index >= 0 for index in ids[:at]) == round(place * size)


@given(size=st.integers(1, 50), length=st.integers(0, 200), seed=st.integers(0, 99))
def test_filler_begins_again_where_it_is_too_short(size, length, seed):
    ids = cut_filler(numpy.arange(size), length, random.Random(seed))
    assert len(ids) == length
    assert all((following - index) % size == 1 % size for index, following in pairwise(ids))


@pytest.fixture
def repeat(filler):
    def texts(**changes):
        return make_repetitions(**{"length": 300, "depth": 0.3, "samples": 3, "filler": filler, "seed": 1, **changes})

    return texts


@pytest.mark.parametrize("depth", [0, 0.3, 1])
def test_the_texts_of_an_induction_differ_in_the_passage_at_the_depth_alone(repeat, depth):
    at = round(depth * (300 - 2 * PASSAGE_TOKENS))
    for candidates in repeat(depth=depth):
        assert len(candidates) == NUM_CANDIDATES
        assert {len(text) for text in candidates} == {300}
        assert len({tuple(text[:at] + text[at + PASSAGE_TOKENS :]) for text in candidates}) == 1
        repeated = candidates[0][-PASSAGE_TOKENS:]
        assert [text[at : at + PASSAGE_TOKENS] == repeated for text in candidates] == [True] + [False] * (NUM_CANDIDATES - 1)


def test_the_same_arguments_draw_the_same_repetitions_and_others_others(repeat):
    assert repeat() == repeat()
    assert repeat() != repeat(seed=2)
    assert repeat()[0] != repeat()[1]
    assert repeat(samples=5)[:3] == repeat()


def test_an_induction_needs_room_for_the_passage_twice(repeat):
    assert len(repeat(length=2 * PASSAGE_TOKENS)[0][0]) == 2 * PASSAGE_TOKENS
    with pytest.raises(ValueError, match="55 tokens are too short for the task induction, which needs at least 56"):
        repeat(length=2 * PASSAGE_TOKENS - 1)


@pytest.mark.parametrize("task", TASKS)
def test_a_length_that_is_too_short_is_refused_with_what_is_needed(draw, task):
    with pytest.raises(ValueError, match=rf"20 tokens are too short for the task {task}, which needs at least \d+") as caught:
        draw(task, length=20)
    needed = int(str(caught.value).rsplit(" ", 1)[1])
    assert draw(task, length=needed + 32)  # numbers are cut into more or fewer tokens
    with pytest.raises(ValueError, match="too short"):
        draw(task, length=needed - 32)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        (" 12345.", 1), ("it is 12345", 1), (" The pass key is (12345), I think", 1),
        (" 123456", 0), (" 912345", 0), (" 1234 5", 0), (" 12,345", 0), ("", 0),
    ],
)  # fmt: skip
def test_a_number_counts_where_it_stands_alone(text, share):
    assert score_answer(Prompt([1], ["12345"]), text) == share


def test_of_several_numbers_the_share_that_was_named_counts_in_any_order():
    prompt = Prompt([1], ["1000001", "1000002", "1000003", "1000004"])
    assert score_answer(prompt, " 1000004, 1000002 and 1000009") == 0.5
    assert score_answer(prompt, " 1000004, 1000003, 1000002, 1000001") == 1
    assert score_answer(prompt, " 1000001 1000001 1000001 1000001") == 0.25
