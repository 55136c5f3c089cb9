import numpy
import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longqlora.data import packing
from longqlora.data.instruction_set import TOKENS
from longqlora.data.packing import (
    PackedRecords,
    PackedWindows,
    best_fit_decreasing,
    count_tokens,
    largest_id,
    load_held_out,
    load_training_data,
    pad_at_right,
    part_of_windows,
    read_tokenized_records,
)
from longqlora.data.token_files import IGNORED, write_tokens


def write_records(path, lengths: list[int]) -> str:
    """Records of distinct tokens, 0, 1, 2, … through all of them, in batches of 3; the first half of each is not learned."""
    starts = numpy.cumsum([0, *lengths])[:-1].tolist()
    rows = [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=True)]
    labels = [[-100] * (len(row) // 2) + row[len(row) // 2 :] for row in rows]
    table = pyarrow.table({"input_ids": rows, "labels": labels}, schema=TOKENS)
    with pyarrow.ipc.new_stream(str(path), TOKENS) as writer:
        writer.write_table(table, max_chunksize=3)
    return str(path)


@settings(max_examples=50)
@given(num_tokens=st.integers(1, 300), length=st.integers(2, 64))
def test_packed_windows_hold_every_token_once(tmp_path_factory, num_tokens, length):
    path = tmp_path_factory.mktemp("w") / "x.bin"
    numpy.arange(num_tokens, dtype="<u2").tofile(path)
    windows = PackedWindows(str(path), length)
    rows = [windows[i]["input_ids"].tolist() for i in range(len(windows))]
    assert [token for row in rows for token in row] == list(range(num_tokens))
    assert all(len(row) == length for row in rows[:-1])
    assert all(set(windows[i]) == {"input_ids", "labels"} for i in range(len(windows)))


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=20), length=st.integers(2, 64))
def test_isolated_documents_begin_again_and_are_not_predicted_from_each_other(tmp_path_factory, lengths, length):
    ends = numpy.cumsum([size + 1 for size in lengths])  # with the end-of-text token
    documents = [list(range(end - size - 1, end - 1)) for size, end in zip(lengths, ends.tolist(), strict=True)]
    path = tmp_path_factory.mktemp("w") / "x.bin"
    write_tokens(path, documents, vocab_size=2**16, eos_token_id=9999)
    windows, plain = PackedWindows(str(path), length, isolate_documents=True), PackedWindows(str(path), length)
    assert len(windows) == len(plain)
    starts = [0, *ends.tolist()]
    for index, window in enumerate(windows[i] for i in range(len(windows))):
        assert window["input_ids"].tolist() == plain[index]["input_ids"].tolist()
        begin = 0
        for offset, token in enumerate(window["input_ids"].tolist()):
            begin = offset if index * length + offset in starts else begin
            assert window["position_ids"][offset] == offset - begin
            assert window["labels"][offset] == (-100 if offset == begin else token)


def test_a_window_of_two_documents_by_hand(tmp_path):
    write_tokens(tmp_path / "x.bin", [[11, 12], [13, 14, 15]], vocab_size=512, eos_token_id=2)
    windows = PackedWindows(str(tmp_path / "x.bin"), 5, isolate_documents=True)
    assert {name: column.tolist() for name, column in windows[0].items()} == {
        "input_ids": [11, 12, 2, 13, 14],
        "labels": [-100, 12, 2, -100, 14],
        "position_ids": [0, 1, 2, 0, 1],
    }
    assert windows[1]["input_ids"].tolist() == [15, 2]
    assert windows[1]["position_ids"].tolist() == [0, 1]  # what a border cuts begins again


@settings(max_examples=200)
@given(data=st.data(), window=st.integers(1, 60))
def test_best_fit_decreasing_packs_each_item_once_and_tightly(data, window):
    lengths = numpy.array(data.draw(st.lists(st.integers(1, window), max_size=60)), dtype="int64")
    windows = best_fit_decreasing(lengths, window)
    assert sorted(item for items in windows for item in items) == list(range(len(lengths)))
    filled = sorted(int(lengths[items].sum()) for items in windows)
    assert all(size <= window for size in filled)
    assert len(filled) < 2 or filled[0] + filled[1] > window  # no two windows could be one
    assert windows == best_fit_decreasing(lengths.copy(), window)


def test_the_fullest_window_with_room_is_taken():
    assert best_fit_decreasing(numpy.array([2, 7, 3, 6, 2]), 10) == [[1, 2], [3, 0, 4]]


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20))
def test_packed_records_are_whole_each_once_and_begin_again(tmp_path_factory, lengths):
    data = PackedRecords(write_records(tmp_path_factory.mktemp("w") / "sft.arrow", lengths), 32)
    assert len(data) <= len(lengths)
    records = []
    for window in (data[i] for i in range(len(data))):
        assert len(window["input_ids"]) <= 32
        begins = (window["position_ids"] == 0).nonzero().flatten().tolist()
        for begin, end in zip(begins, [*begins[1:], len(window["input_ids"])], strict=True):
            ids, labels = window["input_ids"][begin:end].tolist(), window["labels"][begin:end].tolist()
            half = max(1, len(ids) // 2)  # a first token is predicted from nothing
            assert window["position_ids"][begin:end].tolist() == list(range(end - begin))
            assert labels == [-100] * half + ids[half:]
            records.append(ids)
    assert sorted(map(len, records)) == sorted(lengths)
    assert sorted(token for ids in records for token in ids) == list(range(sum(lengths)))


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(0, 30), max_size=20))
def test_tokens_of_records_are_counted_and_read_in_order(tmp_path_factory, lengths):
    records = read_tokenized_records(write_records(tmp_path_factory.mktemp("w") / "sft.arrow", lengths))
    assert count_tokens(records).tolist() == lengths
    rows = [row["input_ids"].tolist() for row in records]
    assert [len(row) for row in rows] == lengths
    assert [int(token) for row in rows for token in row] == list(range(sum(lengths)))


def test_packing_needs_fewer_windows_than_a_record_each(tmp_path):
    lengths = numpy.random.default_rng(0).integers(5, 40, 200).tolist()
    path = write_records(tmp_path / "sft.arrow", lengths)
    packed, plain = (load_training_data(path, 64, pack_records=packed) for packed in (True, False))
    assert len(plain) == 200
    assert len(packed) <= 1.02 * sum(lengths) / 64
    assert set(plain[0]) == {"input_ids", "labels"}


def test_rows_are_padded_at_the_right_and_padding_is_not_learned():
    rows = [{"input_ids": torch.tensor(x), "labels": torch.tensor(x), "source": "a"} for x in ([5, 6, 7], [8])]
    batch = pad_at_right(rows)
    assert {name: column.tolist() for name, column in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 0, 0]],
        "labels": [[5, 6, 7], [8, -100, -100]],
    }
    rows = [{**row, "position_ids": torch.arange(len(row["labels"]))} for row in rows]
    assert pad_at_right(rows)["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]


@given(st.integers(1, 40), st.integers(1, 5))
def test_parts_of_windows_hold_every_token_and_predict_every_label_once(length, parts):
    window = torch.arange(1, 2 * length + 1).view(2, length)
    batch = {"input_ids": window, "labels": window.masked_fill(window % 3 == 0, IGNORED)}
    found = [part_of_windows(batch, part, parts) for part in range(parts)]
    tokens, positions = (torch.cat([part[name] for part in found], dim=1) for name in ("input_ids", "position_ids"))
    assert torch.equal(tokens[:, :length], window)
    assert not tokens[:, length:].any()
    assert torch.equal(positions, torch.arange(tokens.shape[1]).expand(2, -1))
    targets = torch.cat([part["labels"][:, 1:] for part in found], dim=1)
    assert torch.equal(targets[:, : length - 1], batch["labels"][:, 1:])
    assert (targets[:, length - 1 :] == IGNORED).all()
    assert len({part["input_ids"].shape for part in found}) == 1


def test_a_record_longer_than_a_window_is_named(tmp_path):
    path = write_records(tmp_path / "sft.arrow", [3, 16, 17, 30])
    with pytest.raises(
        ValueError, match=r"sft\.arrow: record 2 has 17 tokens, more than a window of 16; pack_records never cuts"
    ):
        load_training_data(path, 16, pack_records=True)
    assert len(load_training_data(path, 30, pack_records=True)) == 3


def test_a_stream_that_does_not_say_where_documents_end_cannot_isolate_them(tmp_path):
    path = tmp_path / "x.bin"
    numpy.arange(100, dtype="<u2").tofile(path)
    with pytest.raises(ValueError, match=r"needs to know where documents end, but .*x\.json does not exist"):
        load_training_data(str(path), 16, isolate_documents=True)
    assert len(load_training_data(str(path), 16)) == 7


# --- the held-out end ------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(num_tokens=st.integers(1, 400), window=st.integers(1, 60))
def test_of_a_stream_every_token_is_trained_on_or_held_out(tmp_path_factory, num_tokens, window):
    path = str(tmp_path_factory.mktemp("stream") / "x.bin")
    write_tokens(path, [list(range(num_tokens - 1))], vocab_size=1000, eos_token_id=999)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "HELD_OUT_TOKENS", 20)
        trained, (held_out, is_held_out) = load_training_data(path, window), load_held_out(path, window)
    wanted = max(20, window)
    assert is_held_out == (wanted <= 0.1 * num_tokens)
    ids = [token for index in range(len(trained)) for token in trained[index]["input_ids"].tolist()]
    end = [token for part in held_out for token in part["input_ids"].tolist()]
    everything = [*range(num_tokens - 1), 999]
    if is_held_out:
        assert len(end) == wanted
        assert ids + end == everything
    else:
        assert ids == everything
        assert end == everything[:wanted]


@settings(max_examples=40)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=80))
def test_of_an_instruction_set_the_last_records_are_held_out(tmp_path_factory, lengths):
    path = write_records(tmp_path_factory.mktemp("records") / "sft.arrow", lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "HELD_OUT_TOKENS", 20)
        trained, (held_out, is_held_out) = load_training_data(path, 10), load_held_out(path, 10)
    sizes = [len(row["input_ids"]) for row in held_out]
    assert sum(sizes) >= min(20, sum(lengths))
    assert sum(sizes[1:] if is_held_out else sizes[:-1]) < 20  # no more records than needed
    last = next((end for end in range(1, len(lengths) + 1) if sum(lengths[-end:]) >= 20), len(lengths))
    assert is_held_out == (20 <= sum(lengths[-last:]) <= 0.1 * sum(lengths))
    if is_held_out:
        assert [len(trained[index]["input_ids"]) for index in range(len(trained))] + sizes == lengths
    else:
        assert len(trained) == len(lengths)
        assert sizes == lengths[: len(sizes)]


def test_the_largest_id_of_training_data_is_found_in_every_batch(tmp_path):
    assert largest_id(write_records(tmp_path / "sft.arrow", [5] * 2005)) == 5 * 2005 - 1
    write_tokens(tmp_path / "x.bin", [[3, 400, 5], [7]], vocab_size=512, eos_token_id=2)
    assert largest_id(str(tmp_path / "x.bin")) == 400
