"""Causal attention inside segments of a window: one call of a fused kernel for each, or for several of equal length together.

A mask would give the same result, but torch's flash kernel for GPUs takes none, and the one for CPUs computes the hidden pairs
as well.

Shapes: b batch, h query heads, h_kv key/value heads, n tokens, d width of a head.
"""

from collections.abc import Iterator
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from torch.autograd import Function
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv

Part = tuple[slice, slice, slice]  # rows, heads and tokens of a tensor [b, h, n, d]


class Cut(Function):
    """The parts of a tensor, as views. Their gradients are written into one tensor; autograd would fill that of each slice with
    zeros to the whole size, and add them up.

    Args:
        x: ``[b, h, n, d]``
        parts: together every element, once.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, parts: list[Part]) -> tuple[torch.Tensor, ...]:
        ctx.parts, ctx.shape = parts, x.shape
        return tuple(x[part] for part in parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        return Join.apply(ctx.parts, ctx.shape, *gradients), None


class Join(Function):
    """Writes the parts of a tensor into it. Their gradients are views; for each assignment, autograd would copy the whole
    gradient.

    Args:
        parts: together every element, once.
        shape: b, h, n and d.
        pieces: contents of the parts.

    Returns:
        ``[b, h, n, d]``, in memory ``[b, n, h, d]``, as linear layers before and after an attention have it.
    """

    @staticmethod
    def forward(ctx: Any, parts: list[Part], shape: tuple[int, int, int, int], *pieces: torch.Tensor) -> torch.Tensor:
        ctx.parts, (b, h, n, d) = parts, shape
        whole = pieces[0].new_empty(b, n, h, d).transpose(1, 2)
        for part, piece in zip(parts, pieces, strict=True):
            whole[part] = piece
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        return None, None, *Cut.apply(gradients[0], ctx.parts)


def runs_of_segments(cuts: range, documents: list[int], *, fold: bool = True) -> Iterator[tuple[slice, int]]:
    """Segments of a row, from cut to cut and never across documents.

    Args:
        cuts: where segments begin besides at the beginning of a document, in tokens.
        documents: lengths of the documents.
        fold: whether segments of equal length that follow each other are one run.

    Yields:
        The tokens of a run, and the length of each of its segments.
    """
    borders = sorted({0, *cuts, *accumulate(documents)})
    begin = 0
    for length, equal in groupby(end - start for start, end in pairwise(borders)):
        number = len(list(equal))
        for run in [number] if fold else [1] * number:
            yield slice(begin, begin + run * length), length
            begin += run * length


def attend_in_equal_segments(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, length: int, **sdpa: Any
) -> torch.Tensor:
    """Causal attention inside segments of one length, which become a batch dimension.

    Args:
        query, key, value: ``[b, h, n, d]``.
        length: of a segment, in tokens; n is a multiple.
        sdpa: further arguments of ``scaled_dot_product_attention``.

    Returns:
        ``[b, h, n, d]``
    """

    def fold(x):
        return x.unflatten(2, (-1, length)).transpose(1, 2).flatten(0, 1)  # [b · segments, h, length, d]

    out = scaled_dot_product_attention(fold(query), fold(key), fold(value), is_causal=True, **sdpa)
    return out.unflatten(0, (len(query), -1)).transpose(1, 2).flatten(2, 3)


def attend_in_segments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cuts: list[tuple[slice, range]],
    documents: list[list[int]] | None = None,
    **sdpa: Any,
) -> torch.Tensor:
    """Causal attention inside segments: no token attends to a token of another segment.

    Args:
        query, key, value: ``[b, h, n, d]`` and twice ``[b, h_kv, n, d]``, h a multiple of h_kv.
        cuts: heads, and where their segments begin besides at the beginning of a document, in tokens; together all heads.
        documents: lengths of each row's documents, in tokens; None if every row is one document.
        sdpa: further arguments of ``scaled_dot_product_attention`` (``scale``, ``dropout_p``).

    Returns:
        ``[b, h, n, d]``, in memory ``[b, n, h, d]``
    """
    b, h, n, _ = query.shape
    rows = [(slice(0, b), [n])] if documents is None else [(slice(i, i + 1), row) for i, row in enumerate(documents)]
    runs = [
        ((row, heads, tokens), length)
        for row, lengths in rows
        for heads, begins in cuts
        if heads.start < heads.stop
        for tokens, length in runs_of_segments(begins, lengths, fold=row.stop - row.start == 1)  # several rows would be copied
    ]
    parts = [part for part, _ in runs]
    inputs = (Cut.apply(x, parts) for x in (query, repeat_kv(key, h // key.shape[1]), repeat_kv(value, h // value.shape[1])))
    # a token that sees itself alone, as one of padding, gets its value; flash's backward pass would take memory for 128 tokens
    alone = 0 if sdpa.get("dropout_p") or all(length == 1 for _, length in runs) else 1  # queries and keys need a gradient
    pieces = [
        v if length == alone else attend_in_equal_segments(q, k, v, length, **sdpa)
        for q, k, v, (_, length) in zip(*inputs, runs, strict=True)
    ]
    return Join.apply(parts, (b, h, n, value.shape[3]), *pieces)
