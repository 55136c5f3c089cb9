"""Shifted Sparse Attention (S²-Attn), the training-time attention of LongLoRA (Chen et al. 2023, arXiv 2309.12307, §3.2).

The sequence is cut into groups of G tokens. The first half of the heads attends inside the groups [0, G), [G, 2G), …; the
second half inside groups shifted by G/2: [0, G/2), [G/2, 3G/2), …, so that information flows between the groups. This is
the causal variant, as in LongLoRA's flash-attention code. The other variant rolls the sequence, which puts the first G/2 tokens
into a group with the last G/2 tokens: they see the future.

If several documents share a window, no token attends to another document, in S²-Attn and in full attention. Documents and
groups cut the window into segments, each with a causal attention of its own (:mod:`longqlora.modeling.segments`), because the
fastest kernels take no mask. transformers recognizes such windows by position ids that start again at 0 (only in a forward pass
without cache and attention mask), and asks the mask function that is registered with the attention for an n × n mask. Ours
returns the lengths of the documents instead.

Shapes: b batch, h query heads, h_kv key/value heads, n tokens, d width of a head, G tokens in a group.
"""

from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from longqlora.modeling.segments import attend_in_segments


def shifted_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    group: int,
    documents: list[list[int]] | None = None,
    straight_heads: int | None = None,
    **sdpa: Any,
) -> torch.Tensor:
    """S²-Attn: the first half of the heads in groups, the second half in groups shifted by half a group.

    Args:
        query, key, value: ``[b, h, n, d]`` and twice ``[b, h_kv, n, d]``, h a multiple of h_kv.
        group: G, in tokens, at least 2; the last group may be shorter.
        documents: the lengths of each row's documents, in tokens; None if every row is one document.
        straight_heads: how many of these heads, the first ones, are in the first half of a layer's heads; None: half of them.
        sdpa: further arguments of ``scaled_dot_product_attention`` (``scale``, ``dropout_p``).

    Returns:
        ``[b, h, n, d]``
    """
    heads, num_tokens = query.shape[1:3]
    straight = heads // 2 if straight_heads is None else straight_heads
    halves = [
        (slice(0, straight), range(group, num_tokens, group)),
        (slice(straight, heads), range(group // 2, num_tokens, group)),
    ]
    return attend_in_segments(query, key, value, halves, documents, **sdpa)


def group_size(num_tokens: int, group_ratio: float) -> int:
    """G, the tokens of a group: the window times ``group_ratio`` (1/4 in the paper), rounded up, at least 2."""
    return max(2, -int(-num_tokens * group_ratio // 1))


def document_lengths(begins: torch.Tensor) -> list[list[int]]:
    """The lengths of the documents in each row, in tokens. On a GPU, this waits for the values.

    Args:
        begins: bool ``[b, n - 1]``, whether a document begins at a token, from the second token on.
    """
    rows = [[0, *(row.nonzero().flatten() + 1).tolist(), len(row) + 1] for row in begins.cpu()]
    return [[end - begin for begin, end in pairwise(borders)] for borders in rows]


def documents_or_mask(
    *, attention_mask=None, allow_is_causal_skip=True, local_size=None, **request
) -> list[list[int]] | torch.Tensor | None:
    """The mask function that transformers calls once per forward pass; every layer gets the result as its attention mask.

    Args:
        attention_mask: ``[b, n]``, False where a token is padding.
        allow_is_causal_skip: False if the mask is more than causal, as with packed documents.
        local_size: the model's sliding window in tokens.
        request: further arguments of ``sdpa_mask``: batch_size, q_length, kv_length, mask_function, device, …

    Returns:
        The lengths of the documents in each row, if documents are packed and the mask hides nothing else; otherwise the mask of
        sdpa attention: None, or ``[b, 1, n, n]``. They are numbers and no tensor, so that no layer waits for a GPU.
    """
    num_tokens = request["q_length"]
    packed = attention_mask is None and not allow_is_causal_skip and request["kv_length"] == num_tokens
    if packed and (local_size is None or local_size >= num_tokens):
        row = torch.arange(request["batch_size"], device=request["device"])[:, None]
        token = torch.arange(1, num_tokens, device=request["device"])[None]
        sees_the_one_before: torch.Tensor = request["mask_function"](row, 0, token, token - 1)  # [b, n - 1]
        return document_lengths(~sees_the_one_before)
    return sdpa_mask(attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, local_size=local_size, **request)


def attend_fully(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Full attention inside documents, or transformers' own if ``attention_mask`` is what :func:`documents_or_mask` returns for
    other windows."""
    if not isinstance(attention_mask, list):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    uncut = [(slice(0, query.shape[1]), range(0))]
    out = attend_in_segments(query, key, value, uncut, attention_mask, scale=scaling, dropout_p=dropout)
    return out.transpose(1, 2), None  # [b, n, h, d]


def register_full_attention() -> str:
    """Register full attention inside documents with transformers and return its name for ``attn_implementation``."""
    AttentionInterface.register("full_in_documents", attend_fully)
    ALL_MASK_ATTENTION_FUNCTIONS.register("full_in_documents", documents_or_mask)
    return "full_in_documents"


def register_shifted_sparse_attention(group_ratio: float, window: int | None = None, *, in_evaluation: bool = False) -> str:
    """Register S²-Attn with transformers and return its name for ``attn_implementation``.

    Padding on the right needs no mask, because causality hides it from every other token.

    Args:
        group_ratio: length of a group as a share of the window, 0 < ratio ≤ 1.
        window: in tokens. Shorter sequences have groups of the same length, so that the result does not depend on how much
            they are padded. None: the window is the length of the sequence.
        in_evaluation: use S²-Attn in evaluation mode too, without a key-value cache; by default a model in evaluation mode
            uses full attention.
    """

    def forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, straight_heads=None, **kwargs):
        if not (module.training or in_evaluation):
            return attend_fully(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
        if isinstance(attention_mask, torch.Tensor):
            raise ValueError(
                "shifted sparse attention takes no attention mask: pad on the right and leave the mask out "
                f"(a model with a sliding window within its {query.shape[2]} tokens makes a mask as well)"
            )
        group = group_size(window or query.shape[2], group_ratio)
        options = {"scale": scaling, "dropout_p": dropout}
        out = shifted_sparse_attention(query, key, value, group, attention_mask, straight_heads, **options)
        return out.transpose(1, 2), None  # [b, n, h, d]

    name = f"shifted_sparse_{group_ratio:g}" + (f"_of_{window}" if window else "") + ("_always" if in_evaluation else "")
    AttentionInterface.register(name, forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, documents_or_mask)
    return name
