from collections import Counter
from itertools import pairwise

import numpy
import pytest
import torch
from conftest import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from longqlora.data.packing import HELD_OUT_TOKENS, pad_at_right
from longqlora.data.pose import PoseWindows
from longqlora.data.token_files import write_tokens


def stream(path, num_tokens: int) -> str:
    """Token i of the stream is i."""
    numpy.arange(num_tokens, dtype="<u2").tofile(path)
    return str(path)


def runs(values: list[int]) -> list[list[int]]:
    """The values cut where the next one is not one more."""
    cuts = [0, *(place for place in range(1, len(values)) if values[place] != values[place - 1] + 1), len(values)]
    return [values[begin:end] for begin, end in pairwise(cuts)]


@settings(max_examples=100, deadline=None)
@given(num_tokens=st.integers(1, 300), length=st.integers(2, 40), factor=st.integers(2, 8), seed=st.integers(0, 5))
def test_a_window_is_two_pieces_of_the_text_at_two_pieces_of_the_positions(tmp_path_factory, num_tokens, length, factor, seed):
    target = factor * length
    path = stream(tmp_path_factory.mktemp("w") / "x.bin", num_tokens)
    windows = PoseWindows(path, length, target_context=target, seed=seed)
    assert len(windows) == -(-num_tokens // length)
    for index, window in enumerate(windows[number] for number in range(len(windows))):
        tokens, positions = window["input_ids"].tolist(), window["position_ids"].tolist()
        begin, n = index * length, min(length, num_tokens - index * length)
        assert len(tokens) == len(positions) == n
        assert window["labels"].tolist() == tokens
        assert window["attention_mask"].tolist() == [1] * n
        assert (tokens[0], positions[0]) == (begin, 0)
        assert tokens[-1] < min(begin + target, num_tokens)
        assert positions[-1] < target
        pieces = [runs(tokens), runs(positions)]
        assert all(len(part) <= 2 for part in pieces)
        firsts = {len(part[0]) for part in pieces if len(part) == 2}
        assert len(firsts) <= 1  # text and positions are cut at the same place
        assert all(1 <= first <= (n + 1) // 2 for first in firsts)


def test_cuts_and_skips_are_uniform_and_independent(tmp_path):
    windows = PoseWindows(stream(tmp_path / "x.bin", 20_000), 4, target_context=8, seed=1)
    drawn = [windows.draw(index) for index in range(4000)]
    for column, values in enumerate(([1, 2], range(5), range(5))):
        counts = Counter(row[column] for row in drawn)
        assert sorted(counts) == list(values)
        assert all(count == pytest.approx(len(drawn) / len(values), rel=0.15) for count in counts.values())
    assert len(set(drawn)) == 2 * 5 * 5
    positions = torch.stack([windows[index]["position_ids"] for index in range(500)])
    assert set((positions[:, :, None] - positions[:, None]).abs().flatten().tolist()) == set(range(8))


def test_windows_are_the_same_for_seed_and_epoch_and_others_in_another_epoch(tmp_path):
    path = stream(tmp_path / "x.bin", 4000)

    def positions(seed: int, epoch: int) -> list:
        windows = PoseWindows(path, 16, target_context=128, seed=seed)
        windows.set_epoch(epoch)
        return [windows[index]["position_ids"].tolist() for index in range(len(windows))]

    assert positions(1, 0) == positions(1, 0)
    assert positions(1, 2) == positions(1, 2)
    assert positions(1, 0) != positions(1, 1)
    assert positions(1, 0) != positions(2, 0)


def test_no_window_holds_a_token_that_is_held_out(tmp_path):
    num_tokens = 10 * HELD_OUT_TOKENS
    write_tokens(tmp_path / "x.bin", [range(num_tokens - 1)], vocab_size=num_tokens, eos_token_id=num_tokens - 1)
    windows = PoseWindows(str(tmp_path / "x.bin"), 500, target_context=4000, seed=1)
    last = max(windows[index]["input_ids"].max().item() for index in range(len(windows) - 20, len(windows)))
    assert num_tokens - HELD_OUT_TOKENS - 500 < last < num_tokens - HELD_OUT_TOKENS


def test_a_message_names_the_tokens_of_both_parts(tmp_path):
    windows = PoseWindows(stream(tmp_path / "x.bin", 300), 10, target_context=100, seed=3)
    first, skipped, _ = windows.draw(2)
    assert skipped > 0
    expected = f"tokens 20 to {19 + first} and {20 + first + skipped} to {29 + skipped} of {tmp_path}/x.bin"
    assert windows.contents(2) == expected


def test_the_second_part_attends_to_the_first(tmp_path):
    """Also in a batch with a shorter window; the reference is a causal mask that is written out."""
    windows = PoseWindows(stream(tmp_path / "x.bin", 90), 40, target_context=120, seed=1)
    batch = pad_at_right([windows[0], windows[2]])
    model = tiny_llama(max_position_embeddings=120).model
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}  # as in training
    with torch.no_grad():
        hidden = model(**inputs, attention_mask=batch["attention_mask"]).last_hidden_state
        causal = torch.ones(40, 40, dtype=torch.bool).tril().expand(2, 1, 40, 40)
        expected = model(**inputs, attention_mask=causal).last_hidden_state
        apart = model(**inputs).last_hidden_state
    for row, length in enumerate((40, 10)):
        first, _, skipped = windows.draw(2 * row)
        assert skipped > 0
        torch.testing.assert_close(hidden[row, :length], expected[row, :length])
        torch.testing.assert_close(hidden[row, :first], apart[row, :first])
        assert (hidden - apart)[row, first:length].abs().max() > 1e-3  # taken for two documents
