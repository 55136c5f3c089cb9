"""Causal attention inside segments of a window: one call of a fused kernel for each, or for several of equal length together.

A mask would give the same result, but torch's flash kernel for GPUs takes none, and the one for CPUs computes the hidden pairs
as well. Only short segments, of which a call each would take longer, are computed together with a mask.

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

SHORT = 256
"""Tokens. Neighbors that are shorter are computed together, in pieces that are not."""
FOLDED = 32
"""Tokens. Shorter segments are not folded into a batch, of whose every entry flash's backward pass keeps 128 tokens."""


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


def lengths_of_segments(cuts: range, documents: list[int]) -> list[int]:
    """Lengths of a row's segments, in tokens, from cut to cut and never across documents.

    Args:
        cuts: where segments begin besides at the beginning of a document, in tokens.
        documents: lengths of the documents.
    """
    return [end - begin for begin, end in pairwise(sorted({0, *cuts, *accumulate(documents)}))]


def computed_at_once(lengths: list[int]) -> Iterator[list[int]]:
    """Yield runs of neighbors: those of equal length, and short ones until they are no longer short together."""
    short: list[int] = []
    for length, equal in groupby(lengths):
        run = list(equal)
        if length >= SHORT or (len(run) > 1 and length >= FOLDED):
            if short:
                yield short
            short = []
            yield run
            continue
        for _ in run:
            short.append(length)
            if sum(short) >= SHORT:
                yield short
                short = []
    if short:
        yield short


def attend_in_run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], **sdpa: Any) -> torch.Tensor:
    """Causal attention inside segments: those of equal length become a batch dimension, others get a mask.

    Args:
        query, key, value: ``[b, h, n, d]``.
        lengths: of the segments, in tokens, together n.
        sdpa: further arguments of ``scaled_dot_product_attention``.

    Returns:
        ``[b, h, n, d]``
    """
    if len(lengths) > 1 and (len({*lengths}) > 1 or lengths[0] < FOLDED):
        return scaled_dot_product_attention(query, key, value, causal_inside(lengths, query.device), **sdpa)

    def fold(x):
        return x.unflatten(2, (-1, lengths[0])).transpose(1, 2).flatten(0, 1)  # [b · segments, h, length, d]

    out = scaled_dot_product_attention(fold(query), fold(key), fold(value), is_causal=True, **sdpa)
    return out.unflatten(0, (len(query), -1)).transpose(1, 2).flatten(2, 3)


def causal_inside(lengths: list[int], device: torch.device) -> torch.Tensor:
    """The mask of causal attention inside segments, bool ``[n, n]``: True where the query (row) sees the key (column)."""
    counts = torch.tensor(lengths, pin_memory=device.type == "cuda").to(device, non_blocking=True)  # without waiting for a GPU
    segment = torch.repeat_interleave(counts, output_size=sum(lengths))  # of each token
    return (segment[:, None] == segment).tril()


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
    parts: list[Part] = []
    runs: list[list[int]] = []
    for row, of_documents in rows:
        for heads, begins in cuts:
            lengths = lengths_of_segments(begins, of_documents) if heads.start < heads.stop else []
            together = computed_at_once(lengths) if row.stop - row.start == 1 else [[length] for length in lengths]
            begin = 0  # several rows are not folded, for which they would be copied
            for run in together:
                parts.append((row, heads, slice(begin, begin + sum(run))))
                runs.append(run)
                begin += sum(run)
    inputs = (Cut.apply(x, parts) for x in (query, repeat_kv(key, h // key.shape[1]), repeat_kv(value, h // value.shape[1])))
    pieces = [attend_in_run(q, k, v, run, **sdpa) for q, k, v, run in zip(*inputs, runs, strict=True)]
    return Join.apply(parts, (b, h, n, value.shape[3]), *pieces)
