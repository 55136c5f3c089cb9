"""Windows to train on: a stream of tokens cut into windows, or whole records packed into them.

Documents that share a window can be kept apart. The position ids then begin again at each document, which is how models of
transformers recognise packed documents and let none attend to another (:mod:`longqlora.attention` does the same), and the
first token of a document is never predicted from the last of another.
"""

import json
from bisect import bisect_left, insort

import numpy
import pyarrow.compute
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from longqlora.tokens import IGNORED, description_path, read_tokens


def keep_apart(input_ids: torch.Tensor, labels: torch.Tensor, lengths: list[int]) -> dict[str, torch.Tensor]:
    """A window of documents that neither see nor predict each other.

    Args:
        input_ids, labels: ``[n]``
        lengths: tokens of each document, in order; they add up to n.

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
    """Index after the last token of each document of a token stream, from the description beside it.

    Raises:
        ValueError: if there is no description, or it does not say where documents end.
    """
    described = description_path(path)
    description = json.loads(described.read_text()) if described.exists() else {}
    if "document_ends" not in description:
        missing = "has no document_ends" if described.exists() else "does not exist"
        raise ValueError(f"{path}: isolate_documents needs to know where documents end, but {described} {missing}")
    return numpy.asarray(description["document_ends"])


class PackedWindows(Dataset):
    """A stream of tokens cut into consecutive windows: every token is in exactly one, the last window may be shorter.

    Args:
        path: of the ``.bin`` file.
        length: of a window, in tokens.
        isolate_documents: keep the documents of a window apart; one that a window's border cuts begins again behind it.

    Raises:
        ValueError: if documents are to be isolated and nothing says where they end.
    """

    def __init__(self, path: str, length: int, *, isolate_documents: bool = False):
        self.path, self.tokens, self.length = path, read_tokens(path), length
        self.document_ends = read_document_ends(path) if isolate_documents else None

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.length)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = index * self.length
        window = torch.from_numpy(self.tokens[start : start + self.length].astype("int64"))
        if self.document_ends is None:
            return {"input_ids": window, "labels": window}
        first, last = self.document_ends.searchsorted([start + 1, start + len(window)])  # ends strictly inside the window
        borders = [start, *self.document_ends[first:last].tolist(), start + len(window)]
        return keep_apart(window, window, numpy.diff(borders).tolist())

    def contents(self, index: int) -> str:
        """What a window holds, for a message."""
        start, stop = index * self.length, min((index + 1) * self.length, len(self.tokens))
        tokens = f"tokens {start} to {stop - 1} of {self.path}"
        if not description_path(self.path).exists():
            return tokens
        first, last = read_document_ends(self.path).searchsorted([start, stop - 1], side="right")
        return f"{tokens}, documents {first} to {last} from 0"


def read_tokenized_records(path: str):
    """A tokenised instruction set (Arrow: ``input_ids``, ``labels``), mapped into memory, as tensors."""
    import datasets  # only instructions need it, and its import takes as long as that of transformers

    return datasets.Dataset.from_file(path).with_format("torch")


def count_tokens(records) -> numpy.ndarray:
    """Tokens of every record, from the offsets of the Arrow lists: the tokens themselves are not read."""
    batches = records.select_columns("input_ids").with_format("arrow").iter(1000)
    counts = [pyarrow.compute.list_value_length(batch["input_ids"]).to_numpy() for batch in batches]
    return numpy.concatenate(counts) if counts else numpy.zeros(0, dtype="int64")


def best_fit_decreasing(lengths: numpy.ndarray, window: int) -> list[list[int]]:
    """Pack items into windows: the longest first, each into the fullest window that still has room for it.

    Args:
        lengths: of the items, at most ``window`` each.
        window: room of a window.

    Returns:
        The items of each window by their indices. Any two windows hold more than one could, so that at most one of them is
        less than half full.
    """
    windows, rooms = [], []  # rooms: what is left in each window that is not full, with its index, ascending
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


class Records(Dataset):
    """The records of a tokenised instruction set, one a row.

    Args:
        path: Arrow file of a tokenised instruction set.
    """

    def __init__(self, path: str):
        self.path, self.records = path, read_tokenized_records(path)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.records[index]

    def contents(self, index: int) -> str:
        """What a row holds, for a message."""
        return f"record {index} from 0 of {self.path}"


class PackedRecords(Dataset):
    """Whole records of a tokenised instruction set packed into windows and kept apart: each is in exactly one, none is cut.

    Args:
        path: Arrow file of a tokenised instruction set.
        length: of a window, in tokens.

    Raises:
        ValueError: if a record is longer than a window.
    """

    def __init__(self, path: str, length: int):
        self.path, self.records = path, read_tokenized_records(path)
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
        return keep_apart(input_ids, labels, [len(row["input_ids"]) for row in rows])

    def contents(self, index: int) -> str:
        """What a window holds, for a message."""
        return f"records {', '.join(map(str, sorted(self.windows[index])))} from 0 of {self.path}"


def load_training_data(
    path: str, context_length: int, *, isolate_documents: bool = False, pack_records: bool = False
) -> Dataset:
    """Windows of a ``.bin`` stream, or the rows (``input_ids``, ``labels``) of a tokenised instruction set.

    Args:
        path: a ``.bin`` file, or the Arrow file of an instruction set.
        context_length: length of a window, in tokens.
        isolate_documents: keep the documents in a window of a stream apart.
        pack_records: pack the records of an instruction set into windows, kept apart, instead of a record a row.

    Raises:
        ValueError: if an option is given that is for the other kind of data, or the data cannot be packed as it asks.
    """
    path = str(path)
    if path.endswith(".bin"):
        if pack_records:
            raise ValueError(
                f"{path}: pack_records is for an instruction set (training.data: sft); a corpus is always packed, "
                "and isolate_documents keeps its documents apart"
            )
        return PackedWindows(path, context_length, isolate_documents=isolate_documents)
    if isolate_documents:
        raise ValueError(
            f"{path}: isolate_documents is for a corpus (training.data: corpus); an instruction set has a record a row, "
            "and pack_records packs them, kept apart"
        )
    if pack_records:
        return PackedRecords(path, context_length)
    return Records(path)


def pad_at_right(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack rows to ``[b, n]``, the shorter ones filled up at their ends: causal attention needs no mask for that.

    Position ids, where rows have them, are filled up with 0, which makes each token of the filling a document of its own.
    """
    filling = {"input_ids": 0, "labels": IGNORED, "position_ids": 0}
    return {
        name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
        for name, value in filling.items()
        if name in rows[0]
    }
