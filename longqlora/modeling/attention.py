"""Shifted Sparse Attention (S²-Attn), the training-time attention of LongLoRA (Chen et al. 2023, arXiv 2309.12307, §3.2).

The sequence is cut into groups of G tokens. The first half of the heads attends inside the groups [0, G), [G, 2G), …; the
second half inside groups shifted by G/2: [0, G/2), [G/2, 3G/2), …, so that information flows between the groups. This is
the causal variant, as in LongLoRA's flash-attention code. The other variant rolls the sequence, which puts the first G/2 tokens
into a group with the last G/2 tokens: they see the future.

If several documents share a window, no token attends to another document. transformers recognizes such windows by position ids
that start again at 0 (only in a forward pass without cache and attention mask), and asks the mask function that is registered
with the attention for an n × n mask. Ours returns the document number of each token instead, from which each group makes its
G × G mask.

Shapes: b batch, h query heads, h_kv key/value heads, n tokens, d width of a head, G tokens in a group.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask


def causal_inside_documents(documents: torch.Tensor) -> torch.Tensor:
    """The mask of causal attention inside documents: True where the query (row) sees the key (column). Every token sees itself.

    Args:
        documents: ``[b, n]``, the document number of each token.

    Returns:
        bool ``[b, 1, n, n]``
    """
    return (documents[:, :, None] == documents[:, None, :]).tril()[:, None]


def attend_in_groups(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    group: int,
    documents: torch.Tensor | None = None,
    **sdpa: Any,
) -> torch.Tensor:
    """Causal attention inside consecutive groups of ``group`` tokens; the last group may be shorter.

    The groups become a batch dimension, so that one call of the fused kernel computes all of them. The last group is padded at
    its end, where causality hides the padding. With documents, the masks of all groups together have n · G elements.

    Args:
        query, key, value: ``[b, h, n, d]``.
        group: G, in tokens.
        documents: ``[b, n]``, the document number of each token; None if the window is one document.
        sdpa: further arguments of ``scaled_dot_product_attention`` (``scale``, ``dropout_p``).

    Returns:
        ``[b, h, n, d]``
    """
    b, n = query.shape[0], query.shape[2]
    group = min(group, n)
    missing = -n % group

    def fold(x):
        x = pad(x, (0, 0, 0, missing)) if missing else x
        return x.unflatten(2, (-1, group)).transpose(1, 2).flatten(0, 1)  # [b · groups, h, G, d]

    if documents is None:
        sdpa["is_causal"] = True  # the fastest kernels take no mask
    else:
        sdpa["attn_mask"] = causal_inside_documents(pad(documents, (0, missing)).reshape(-1, group))  # [b · groups, 1, G, G]
    out = scaled_dot_product_attention(fold(query), fold(key), fold(value), **sdpa)
    return out.unflatten(0, (b, -1)).transpose(1, 2).flatten(2, 3)[:, :, :n]


def shifted_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    group: int,
    documents: torch.Tensor | None = None,
    straight_heads: int | None = None,
    **sdpa: Any,
) -> torch.Tensor:
    """S²-Attn: the first half of the heads in groups, the second half in groups shifted by half a group.

    Args:
        query, key, value: ``[b, h, n, d]``, h the same for all three.
        group: G, in tokens, at least 2.
        documents: ``[b, n]``, the document number of each token; None if the window is one document.
        straight_heads: how many of these heads, the first ones, are in the first half of a layer's heads; None: half of them.
        sdpa: further arguments of ``scaled_dot_product_attention``.

    Returns:
        ``[b, h, n, d]``
    """
    heads, border = query.shape[1] // 2 if straight_heads is None else straight_heads, group // 2
    straight = attend_in_groups(query[:, :heads], key[:, :heads], value[:, :heads], group, documents, **sdpa)
    if heads == query.shape[1]:
        return straight
    query, key, value = query[:, heads:], key[:, heads:], value[:, heads:]
    shifted = []
    for part in (slice(None, border), slice(border, None)):  # the first, half group and all others
        if query[:, :, part].shape[2]:
            own = None if documents is None else documents[:, part]
            shifted.append(attend_in_groups(query[:, :, part], key[:, :, part], value[:, :, part], group, own, **sdpa))
    return torch.cat([straight, torch.cat(shifted, dim=2)], dim=1)


def group_size(num_tokens: int, group_ratio: float) -> int:
    """G, the tokens of a group: the window times ``group_ratio`` (1/4 in the paper), rounded up, at least 2."""
    return max(2, -int(-num_tokens * group_ratio // 1))


def number_documents(batch_size: int, num_tokens: int, visible: Callable, device: torch.device) -> torch.Tensor:
    """The document number of each token; a document begins where a token does not see the token before it.

    Args:
        batch_size, num_tokens: shape of the result.
        visible: mask function of transformers: from indices (batch, head, query, key) to whether the query sees the key.
        device: of the result.

    Returns:
        ``[b, n]``
    """
    row = torch.arange(batch_size, device=device)[:, None]
    token = torch.arange(1, num_tokens, device=device)[None]
    begins = ~visible(row, 0, token, token - 1)  # [b, n - 1]
    return pad(begins.cumsum(-1), (1, 0))


def documents_or_mask(*, attention_mask=None, allow_is_causal_skip=True, local_size=None, **request) -> torch.Tensor | None:
    """The mask function that transformers calls once per forward pass; every layer gets the result as its attention mask.

    Args:
        attention_mask: ``[b, n]``, False where a token is padding.
        allow_is_causal_skip: False if the mask is more than causal, as with packed documents.
        local_size: the model's sliding window in tokens.
        request: further arguments of ``sdpa_mask``: batch_size, q_length, kv_length, mask_function, device, …

    Returns:
        ``[b, n]``, the document number of each token, if documents are packed and the mask hides nothing else; otherwise the
        mask of sdpa attention: None, or ``[b, 1, n, n]``.
    """
    num_tokens = request["q_length"]
    packed = attention_mask is None and not allow_is_causal_skip and request["kv_length"] == num_tokens
    if packed and (local_size is None or local_size >= num_tokens):
        return number_documents(request["batch_size"], num_tokens, request["mask_function"], request["device"])
    return sdpa_mask(attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, local_size=local_size, **request)


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
        documents = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
        if not (module.training or in_evaluation):
            mask = attention_mask if documents is None else causal_inside_documents(documents)
            return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
        if attention_mask is not None and documents is None:
            raise ValueError(
                "shifted sparse attention takes no attention mask: pad on the right and leave the mask out "
                f"(a model with a sliding window within its {query.shape[2]} tokens makes a mask as well)"
            )
        repeats = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)  # [b, h_kv, n, d] -> [b, h, n, d]
        group = group_size(window or query.shape[2], group_ratio)
        out = shifted_sparse_attention(query, key, value, group, documents, straight_heads, scale=scaling, dropout_p=dropout)
        return out.transpose(1, 2).contiguous(), None  # [b, n, h, d]

    name = f"shifted_sparse_{group_ratio:g}" + (f"_of_{window}" if window else "") + ("_always" if in_evaluation else "")
    AttentionInterface.register(name, forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, documents_or_mask)
    return name
