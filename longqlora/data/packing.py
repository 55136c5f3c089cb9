"""Windows to train on: a stream of tokens cut into windows, or whole records packed into them.

Documents that share a window can be kept apart. The position ids then begin again at each document, which is how models of
transformers recognise packed documents and let none attend to another (:mod:`longqlora.modeling.attention` does the same),
and the first token of a document is never predicted from the last of another.
"""

import json
from bisect import bisect_left, insort

import numpy
import pyarrow.compute
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from longqlora.data.token_descriptions import description_path
from longqlora.data.token_files import IGNORED, read_tokens

HELD_OUT_TOKENS = 16384
MAX_HELD_OUT_SHARE = 0.1  # of the training data


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


def held_out_tokens(num_tokens: int, window: int) -> int:
    """Tokens at the end of the training data that are not trained on, so that merges can be compared on them: 16,384 or one
    window, whichever is more; none where that is more than a tenth of the data.

    Args:
        num_tokens: of the training data.
        window: in tokens.
    """
    wanted = max(HELD_OUT_TOKENS, window)
    return wanted if wanted <= MAX_HELD_OUT_SHARE * num_tokens else 0


class PackedWindows(Dataset):
    """A stream of tokens cut into consecutive windows: every token is in exactly one, the last window may be shorter.

    Args:
        path: of the ``.bin`` file.
        length: of a window, in tokens.
        isolate_documents: keep the documents of a window apart; one that a window's border cuts begins again behind it.
        begin, end: the part of the stream, in tokens; None is its end.

    Raises:
        ValueError: if documents are to be isolated and nothing says where they end.
    """

    def __init__(self, path: str, length: int, *, isolate_documents: bool = False, begin: int = 0, end: int | None = None):
        self.path, self.tokens, self.length, self.begin = path, read_tokens(path), length, begin
        self.end = len(self.tokens) if end is None else end
        self.document_ends = read_document_ends(path) if isolate_documents else None

    def __len__(self) -> int:
        return -(-(self.end - self.begin) // self.length)

    def borders(self, index: int) -> tuple[int, int]:
        """The first token of a window, and the one after its last."""
        start = self.begin + index * self.length
        return start, min(start + self.length, self.end)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start, stop = self.borders(index)
        window = torch.from_numpy(self.tokens[start:stop].astype("int64"))
        if self.document_ends is None:
            return {"input_ids": window, "labels": window}
        first, last = self.document_ends.searchsorted([start + 1, start + len(window)])  # ends strictly inside the window
        borders = [start, *self.document_ends[first:last].tolist(), start + len(window)]
        return keep_apart(window, window, numpy.diff(borders).tolist())

    def contents(self, index: int) -> str:
        """What a window holds, for a message."""
        start, stop = self.borders(index)
        tokens = f"tokens {start} to {stop - 1} of {self.path}"
        if not description_path(self.path).exists():
            return tokens
        first, last = read_document_ends(self.path).searchsorted([start, stop - 1], side="right")
        return f"{tokens}, documents {first} to {last} from 0"


def read_tokenized_records(path: str, begin: int = 0, end: int | None = None):
    """Records of a tokenised instruction set (Arrow: ``input_ids``, ``labels``), mapped into memory, as tensors."""
    import datasets  # only instructions need it, and its import takes as long as that of transformers

    records = datasets.Dataset.from_file(path).with_format("torch")
    return records.select(range(begin, len(records) if end is None else end))


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
        begin, end: the first record and the one after the last; None is the end of the set.
    """

    def __init__(self, path: str, *, begin: int = 0, end: int | None = None):
        self.path, self.records = path, read_tokenized_records(path, begin, end)

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
        begin, end: the first record and the one after the last; None is the end of the set.

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
        return keep_apart(input_ids, labels, [len(row["input_ids"]) for row in rows])

    def contents(self, index: int) -> str:
        """What a window holds, for a message."""
        return f"records {', '.join(map(str, sorted(self.windows[index])))} from 0 of {self.path}"


def load_training_data(path: str, window: int, *, isolate_documents: bool = False, pack_records: bool = False) -> Dataset:
    """What is trained on: windows of a ``.bin`` stream, or the rows (``input_ids``, ``labels``) of a tokenised instruction set,
    without the end of the data that is held out (:func:`held_out_tokens`).

    Args:
        path: a ``.bin`` file, or the Arrow file of an instruction set.
        window: in tokens.
        isolate_documents: keep the documents in a window of a stream apart.
        pack_records: pack the records of an instruction set into windows, kept apart, instead of a record a row.

    Raises:
        ValueError: if an option is given that is for the other kind of data, or the data cannot be packed as it asks.
    """
    path = str(path)
    end = begin_of_held_out(path, window)
    if path.endswith(".bin"):
        if pack_records:
            raise ValueError(
                f"{path}: pack_records is for an instruction set (training.data: sft); a corpus is always packed, "
                "and isolate_documents keeps its documents apart"
            )
        return PackedWindows(path, window, isolate_documents=isolate_documents, end=end)
    if isolate_documents:
        raise ValueError(
            f"{path}: isolate_documents is for a corpus (training.data: corpus); an instruction set has a record a row, "
            "and pack_records packs them, kept apart"
        )
    return PackedRecords(path, window, end=end) if pack_records else Records(path, end=end)


def begin_of_held_out(path: str, window: int) -> int | None:
    """The first token of a stream, or the first record of an instruction set, that is not trained on; None where the data are
    too few to hold any out."""
    if path.endswith(".bin"):
        num_tokens = len(read_tokens(path))
        wanted = held_out_tokens(num_tokens, window)
        return num_tokens - wanted if wanted else None
    from_end = count_tokens(read_tokenized_records(path))[::-1].cumsum()  # tokens of the last record, the last two, …
    last = int(from_end.searchsorted(max(HELD_OUT_TOKENS, window)))
    enough = last < len(from_end) and from_end[last] <= MAX_HELD_OUT_SHARE * from_end[-1]  # no record is cut
    return len(from_end) - last - 1 if enough else None


def load_held_out(path: str, window: int, *, isolate_documents: bool = False) -> tuple[list[dict[str, torch.Tensor]], bool]:
    """Training data to compare models on that no training has seen: the end of the data; where they are too few for that, their
    beginning, which was trained on.

    Args:
        path, window, isolate_documents: see :func:`load_training_data`; records are not packed.

    Returns:
        Windows or records of at least :data:`HELD_OUT_TOKENS` and one window in all, as far as there are so many; and whether
        they were held out.
    """
    begin = begin_of_held_out(path, window)
    if path.endswith(".bin"):
        part = {"begin": begin} if begin else {"end": min(max(HELD_OUT_TOKENS, window), len(read_tokens(path)))}
        windows = PackedWindows(path, window, isolate_documents=isolate_documents, **part)
    elif begin:
        windows = Records(path, begin=begin)
    else:
        from_begin = count_tokens(read_tokenized_records(path)).cumsum()
        windows = Records(path, end=min(int(from_begin.searchsorted(max(HELD_OUT_TOKENS, window))) + 1, len(from_begin)))
    return [windows[index] for index in range(len(windows))], bool(begin)


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
