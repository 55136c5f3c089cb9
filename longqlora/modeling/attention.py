"""Shifted Sparse Attention (S²-Attn), the training-time attention of LongLoRA (Chen et al. 2023, arXiv 2309.12307, §3.2).

The sequence is cut into groups of G tokens. The first half of the heads attends inside the groups [0, G), [G, 2G), …; the
second half inside groups shifted by G/2: [0, G/2), [G/2, 3G/2), …, so that information flows between the groups. This is
the causal variant (LongLoRA's flash-attention one): the variant that rolls the sequence puts its first G/2 tokens into one
group with its last, where they see the future.

Where several documents share a window, each attends to itself alone, inside the groups. transformers finds them by position
ids that begin again (and only in a forward pass with neither cache nor attention mask), and asks the mask function that is
registered with the attention for an n × n mask; ours answers with the number of each token's document, from which a mask of
G × G is made per group.

Shapes: b batch, h query heads, h_kv key/value heads, n tokens, d width of a head, G tokens of a group.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask


def causal_inside_documents(documents: torch.Tensor) -> torch.Tensor:
    """Who may see whom: tokens of the same document that are not in the future. Every token sees itself, so no row is empty.

    Args:
        documents: ``[b, n]``, the number of each token's document.

    Returns:
        bool ``[b, 1, n, n]``
    """
    return (documents[:, :, None] == documents[:, None, :]).tril()[:, None]


def attend_in_groups(query, key, value, group: int, documents: torch.Tensor | None = None, **sdpa) -> torch.Tensor:
    """Causal attention inside consecutive groups of ``group`` tokens, the last one shorter where n is no multiple.

    The groups become a batch dimension, so one call of the fused kernel serves all of them. The last group is filled up at
    its end, where causality hides the filling. Documents cost masks of n · G in all.

    Args:
        query, key, value: ``[b, h, n, d]``.
        group: G, in tokens.
        documents: ``[b, n]``, the number of each token's document, none of which sees another; None: it is one.
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
        mask = {"is_causal": True}  # the fastest kernels take no mask
    else:
        mask = {"attn_mask": causal_inside_documents(pad(documents, (0, missing)).reshape(-1, group))}  # [b · groups, 1, G, G]
    out = scaled_dot_product_attention(fold(query), fold(key), fold(value), **mask, **sdpa)
    return out.unflatten(0, (b, -1)).transpose(1, 2).flatten(2, 3)[:, :, :n]


def shifted_sparse_attention(query, key, value, group: int, documents: torch.Tensor | None = None, **sdpa) -> torch.Tensor:
    """S²-Attn: the first half of the heads in groups, the second half in groups shifted by half a group.

    Args:
        query, key, value: ``[b, h, n, d]``, h the same for all three.
        group: G, in tokens, at least 2.
        documents: ``[b, n]``, the number of each token's document, none of which sees another; None: it is one.
        sdpa: further arguments of ``scaled_dot_product_attention``.

    Returns:
        ``[b, h, n, d]``
    """
    half_of_heads, half_of_group = query.shape[1] // 2, group // 2
    straight, shifted = zip(*(x.tensor_split([half_of_heads], dim=1) for x in (query, key, value)), strict=True)
    first, rest = zip(*(x.tensor_split([half_of_group], dim=2) for x in shifted), strict=True)
    documents_of = (None, None) if documents is None else documents.tensor_split([half_of_group], dim=1)
    parts = [
        attend_in_groups(*part, group, owners, **sdpa)
        for part, owners in zip((first, rest), documents_of, strict=True)
        if part[0].shape[2]
    ]
    return torch.cat([attend_in_groups(*straight, group, documents, **sdpa), torch.cat(parts, dim=2)], dim=1)


def group_size(num_tokens: int, group_ratio: float) -> int:
    """G of a sequence: its length times ``group_ratio`` (the paper's is 1/4), rounded up, at least 2 tokens."""
    return max(2, -int(-num_tokens * group_ratio // 1))


def number_documents(batch_size: int, num_tokens: int, visible: Callable, device: torch.device) -> torch.Tensor:
    """The number of each token's document: one begins where a token does not see the token before it.

    Args:
        visible: a mask function of transformers, (batch, head, query, key) indices -> whether the query sees the key.

    Returns:
        ``[b, n]``
    """
    row = torch.arange(batch_size, device=device)[:, None]
    token = torch.arange(1, num_tokens, device=device)[None]
    begins = ~visible(row, 0, token, token - 1)  # [b, n - 1]
    return pad(begins.cumsum(-1), (1, 0))


def documents_or_mask(*, attention_mask=None, allow_is_causal_skip=True, local_size=None, **request) -> torch.Tensor | None:
    """What transformers asks once per forward pass and hands to each layer as its mask.

    Args:
        attention_mask: ``[b, n]``, of padding.
        allow_is_causal_skip: False where causality is not all, as with packed documents.
        local_size: the model's sliding window in tokens.
        request: to ``sdpa_mask``: batch_size, q_length, kv_length, mask_function, device, …

    Returns:
        ``[b, n]``, the number of each token's document, where documents are packed and nothing else is to be masked;
        otherwise what sdpa attention gets: None, or ``[b, 1, n, n]``.
    """
    num_tokens = request["q_length"]
    packed = attention_mask is None and not allow_is_causal_skip and request["kv_length"] == num_tokens
    if packed and (local_size is None or local_size >= num_tokens):
        return number_documents(request["batch_size"], num_tokens, request["mask_function"], request["device"])
    return sdpa_mask(attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, local_size=local_size, **request)


def register_shifted_sparse_attention(group_ratio: float, window: int | None = None, *, in_evaluation: bool = False) -> str:
    """Register S²-Attn with transformers and return its name for ``attn_implementation``.

    Padding at the right needs no mask, because causality hides it from every real token.

    Args:
        group_ratio: length of a group as a share of the window, 0 < ratio ≤ 1.
        window: in tokens; a shorter sequence then has groups of the same length, so that what it is batched and padded with
            changes nothing. None: each sequence is its own window.
        in_evaluation: use it in evaluation mode too; else the same model attends fully there. It takes no cache of keys.
    """

    def forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        documents = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
        if not (module.training or in_evaluation):
            mask = attention_mask if documents is None else causal_inside_documents(documents)
            return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
        if attention_mask is not None and documents is None:
            raise ValueError(
                "shifted sparse attention takes no attention mask: pad at the right and leave the mask out "
                f"(a model with a sliding window within its {query.shape[2]} tokens makes a mask as well)"
            )
        repeats = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)  # [b, h_kv, n, d] -> [b, h, n, d]
        group = group_size(window or query.shape[2], group_ratio)
        out = shifted_sparse_attention(query, key, value, group, documents, scale=scaling, dropout_p=dropout)
        return out.transpose(1, 2).contiguous(), None  # [b, n, h, d]

    name = f"shifted_sparse_{group_ratio:g}" + (f"_of_{window}" if window else "") + ("_always" if in_evaluation else "")
    AttentionInterface.register(name, forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, documents_or_mask)
    return name
