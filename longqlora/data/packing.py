"""Training windows: a token stream cut into windows, or whole records packed into windows.

Documents that share a window can be isolated: position ids restart at each document, and its first token is not predicted. From
the position ids, models of transformers recognize packed documents and prevent attention between them
(:mod:`longqlora.modeling.attention` does the same).
"""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence

import numpy
import pyarrow.compute
import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from longqlora.data.token_descriptions import description_path, largest_token, read_description
from longqlora.data.token_files import IGNORED, read_tokens

HELD_OUT_TOKENS = 16384
MAX_HELD_OUT_SHARE = 0.1  # of the training data


def isolated_documents(input_ids: torch.Tensor, labels: torch.Tensor, lengths: list[int]) -> dict[str, torch.Tensor]:
    """Window of documents that do not attend to each other and are not predicted from each other.

    Args:
        input_ids, labels: ``[n]``
        lengths: number of tokens of each document, in order; they add up to n.

    Returns:
        input_ids, labels and position_ids, ``[n]`` each.
    """
    position_ids = torch.cat([torch.arange(length) for length in lengths])
    return {
        "input_ids": input_ids,
        "labels": labels.masked_fill(position_ids == 0, IGNORED),
        "position_ids": position_ids,
    }


def read_document_ends(path: str) -> numpy.ndarray:
    """Index after the last token of each document of a token stream, ``[num_documents]``, from the description next to it.

    Raises:
        ValueError: if there is no description.
    """
    described = description_path(path)
    if not described.exists():
        raise ValueError(f"{path}: isolate_documents needs to know where documents end, but {described} does not exist")
    return numpy.asarray(read_description(path)["document_ends"])


def held_out_tokens(num_tokens: int, window: int) -> int:
    """Number of tokens at the end of the training data that are not trained on, so that merges can be compared on them.

    It is 16,384 or one window, whichever is more, or 0 if that would be more than a tenth of the data.

    Args:
        num_tokens: of the training data.
        window: length of a window in tokens.
    """
    wanted = max(HELD_OUT_TOKENS, window)
    return wanted if wanted <= MAX_HELD_OUT_SHARE * num_tokens else 0


class PackedWindows(Dataset):
    """A token stream cut into consecutive windows. Every token is in exactly one window; the last window may be shorter.

    Args:
        path: of the ``.bin`` file.
        length: of a window, in tokens.
        isolate_documents: isolate the documents in a window; one that continues in the next window is a new document there.
        begin, end: part of the stream, in tokens; None: its end.

    Raises:
        ValueError: if documents are to be isolated and it is not known where they end.
    """

    def __init__(self, path: str, length: int, *, isolate_documents: bool = False, begin: int = 0, end: int | None = None):
        self.path, self.tokens, self.length, self.begin = path, read_tokens(path), length, begin
        self.end = len(self.tokens) if end is None else end
        self.document_ends = read_document_ends(path) if isolate_documents else None

    def __len__(self) -> int:
        return -(-(self.end - self.begin) // self.length)

    def span(self, index: int) -> tuple[int, int]:
        """(begin, end) of a window in the stream, in tokens."""
        begin = self.begin + index * self.length
        return begin, min(begin + self.length, self.end)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        begin, end = self.span(index)
        window = torch.from_numpy(self.tokens[begin:end].astype("int64"))
        if self.document_ends is None:
            return {"input_ids": window, "labels": window}
        first, last = self.document_ends.searchsorted([begin + 1, end])  # document ends strictly inside the window
        boundaries = [begin, *self.document_ends[first:last].tolist(), end]
        return isolated_documents(window, window, numpy.diff(boundaries).tolist())

    def contents(self, index: int) -> str:
        """Tokens and documents of a window, for a message; both are counted from 0."""
        begin, end = self.span(index)
        tokens = f"tokens {begin} to {end - 1} of {self.path}"
        if not description_path(self.path).exists():
            return tokens
        first, last = read_document_ends(self.path).searchsorted([begin, end - 1], side="right")
        return f"{tokens}, documents {first} to {last} from 0"


def read_tokenized_records(path: str, begin: int = 0, end: int | None = None):
    """Records of a tokenized instruction set (Arrow: ``input_ids``, ``labels``), mapped into memory, as tensors.

    Args:
        path: of the Arrow file.
        begin, end: part of the set, in records; None: its end.
    """
    import datasets  # only instructions need it, and importing it takes as long as importing transformers

    records = datasets.Dataset.from_file(path).with_format("torch")
    return records.select(range(begin, len(records) if end is None else end))


def count_tokens(records) -> numpy.ndarray:
    """Number of tokens of every record, from the offsets of the Arrow lists: the tokens themselves are not read."""
    batches = records.select_columns("input_ids").with_format("arrow").iter(1000)
    counts = [pyarrow.compute.list_value_length(batch["input_ids"]).to_numpy() for batch in batches]
    return numpy.concatenate(counts) if counts else numpy.zeros(0, dtype="int64")


def largest_id(path: str) -> int:
    """The largest token id in training data: a ``.bin`` file, or the Arrow file of an instruction set."""
    if path.endswith(".bin"):
        return largest_token(path)
    batches = read_tokenized_records(path).select_columns("input_ids").with_format("arrow").iter(1000)
    return max((pyarrow.compute.max(batch["input_ids"].combine_chunks().flatten()).as_py() for batch in batches), default=0)


def best_fit_decreasing(lengths: numpy.ndarray, window: int) -> list[list[int]]:
    """Pack items into windows: the longest item first, each into the fullest window that has room for it.

    Args:
        lengths: of the items, ``[num_items]``, at most ``window`` each.
        window: length of a window.

    Returns:
        Indices of the items in each window. No two windows would fit into one, so at most one window is less than half full.
    """
    windows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # free length and index of each window that is not full, ascending
    for item in numpy.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        fitting = bisect_left(rooms, (length, -1))
        if fitting == len(rooms):
            room, index = window, len(windows)
            windows.append([])
        else:
            room, index = rooms.pop(fitting)
        windows[index].append(item)
        if room > length:
            insort(rooms, (room - length, index))
    return windows


class UnpackedRecords(Dataset):
    """Records of a tokenized instruction set, one per row.

    Args:
        path, begin, end: see :func:`read_tokenized_records`.
    """

    def __init__(self, path: str, *, begin: int = 0, end: int | None = None):
        self.path, self.records = path, read_tokenized_records(path, begin, end)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.records[index]

    def contents(self, index: int) -> str:
        """Record of a row, for a message; counted from 0."""
        return f"record {index} from 0 of {self.path}"


class PackedRecords(Dataset):
    """Records of a tokenized instruction set packed into windows, isolated from each other; no record is cut.

    Args:
        path, begin, end: see :func:`read_tokenized_records`.
        length: of a window, in tokens.

    Raises:
        ValueError: if a record is longer than a window.
    """

    def __init__(self, path: str, length: int, *, begin: int = 0, end: int | None = None):
        self.path, self.records = path, read_tokenized_records(path, begin, end)
        lengths = count_tokens(self.records)
        if (lengths > length).any():
            index = int((lengths > length).argmax())
            raise ValueError(
                f"{path}: record {index} has {lengths[index]} tokens, more than a window of {length}; "
                "pack_records never cuts a record"
            )
        self.windows = best_fit_decreasing(lengths, length)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rows = [self.records[record] for record in self.windows[index]]
        input_ids, labels = (torch.cat([row[column] for row in rows]) for column in ("input_ids", "labels"))
        return isolated_documents(input_ids, labels, [len(row["input_ids"]) for row in rows])

    def contents(self, index: int) -> str:
        """Records of a window, for a message; counted from 0."""
        return f"records {', '.join(map(str, sorted(self.windows[index])))} from 0 of {self.path}"


TrainingData = PackedWindows | UnpackedRecords | PackedRecords


def load_training_data(path: str, window: int, *, isolate_documents: bool = False, pack_records: bool = False) -> TrainingData:
    """Training windows: of a token stream, or of a tokenized instruction set (a record per row, or packed records).

    The end of the data that is held out (:func:`held_out_tokens`) is not part of it.

    Args:
        path: a ``.bin`` file, or the Arrow file of an instruction set.
        window: length of a window in tokens.
        isolate_documents: for a stream: isolate the documents in a window.
        pack_records: for an instruction set: pack the records into windows instead of one per row.

    Raises:
        ValueError: if documents are to be isolated and it is not known where they end, or a record is longer than a window.
    """
    path = str(path)
    end = held_out_begin(path, window)
    if path.endswith(".bin"):
        return PackedWindows(path, window, isolate_documents=isolate_documents, end=end)
    return PackedRecords(path, window, end=end) if pack_records else UnpackedRecords(path, end=end)


def held_out_begin(path: str, window: int) -> int | None:
    """Index of the first held-out token of a stream, or record of an instruction set; None if too few data to hold out any.

    Args:
        path, window: see :func:`load_training_data`.
    """
    if path.endswith(".bin"):
        num_tokens = len(read_tokens(path))
        wanted = held_out_tokens(num_tokens, window)
        return num_tokens - wanted if wanted else None
    from_end = count_tokens(read_tokenized_records(path))[::-1].cumsum()  # tokens of the last record, the last two, …
    last = int(from_end.searchsorted(max(HELD_OUT_TOKENS, window)))
    enough = last < len(from_end) and from_end[last] <= MAX_HELD_OUT_SHARE * from_end[-1]  # no record is cut
    return len(from_end) - last - 1 if enough else None


def load_held_out(path: str, window: int, *, isolate_documents: bool = False) -> tuple[list[dict[str, torch.Tensor]], bool]:
    """Windows or records to compare merges on: the held-out end of the training data.

    If there are too few data to hold out any, it is the beginning of the data, which was trained on.

    Args:
        path, window, isolate_documents: see :func:`load_training_data`; records are not packed.

    Returns:
        Windows or records with at least :data:`HELD_OUT_TOKENS` tokens and one window together, or all if there are fewer; and
        whether they were held out.
    """
    begin, wanted = held_out_begin(path, window), max(HELD_OUT_TOKENS, window)
    data: PackedWindows | UnpackedRecords
    if path.endswith(".bin"):
        end = None if begin else min(wanted, len(read_tokens(path)))
        data = PackedWindows(path, window, isolate_documents=isolate_documents, begin=begin or 0, end=end)
    elif begin:
        data = UnpackedRecords(path, begin=begin)
    else:
        from_begin = count_tokens(read_tokenized_records(path)).cumsum()
        data = UnpackedRecords(path, end=min(int(from_begin.searchsorted(wanted)) + 1, len(from_begin)))
    return [data[index] for index in range(len(data))], bool(begin)


def pad_at_right(rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack rows to ``[b, n]`` and pad the shorter ones at their ends, for which causal attention needs no mask.

    Position ids, if the rows have them, are padded with 0, so that each padding token is a document of its own. An attention
    mask is padded with 1: one that hides nothing stays so, and attention can use the fastest kernels.
    """
    padding = {"input_ids": 0, "labels": IGNORED, "position_ids": 0, "attention_mask": 1}
    return {
        name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
        for name, value in padding.items()
        if name in rows[0]
    }


def part_of_windows(batch: Mapping[str, torch.Tensor], part: int, parts: int) -> dict[str, torch.Tensor]:
    """One of several parts of the tokens of a batch.

    Args:
        batch: input_ids and labels, ``[b, n]``, of windows of one document each.
        part: which one, from 0.
        parts: how many; the windows are padded to a multiple.

    Returns:
        input_ids and position_ids, ``[b, m]``, and labels, ``[b, m + 1]``: the last token of a part predicts the first of the
        next one.
    """
    num_tokens = batch["input_ids"].shape[1]
    length = -(-num_tokens // parts)
    missing, begin = length * parts - num_tokens, part * length
    positions = torch.arange(begin, begin + length)
    return {
        "input_ids": pad(batch["input_ids"], (0, missing))[:, begin : begin + length],
        "labels": pad(batch["labels"], (0, missing + 1), value=IGNORED)[:, begin : begin + length + 1],
        "position_ids": positions.expand(len(batch["input_ids"]), -1),
    }
