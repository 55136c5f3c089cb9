"""Shifted Sparse Attention (S²-Attn), the training-time attention of LongLoRA (Chen et al. 2023, arXiv 2309.12307, §3.2).

The sequence is cut into groups of G tokens. The first half of the heads attends inside the groups [0, G), [G, 2G), …; the
second half inside groups shifted by G/2: [0, G/2), [G/2, 3G/2), …, so that information flows between the groups. This is
the causal variant (LongLoRA's flash-attention one): the variant that rolls the sequence puts its first G/2 tokens into one
group with its last, where they see the future.

Shapes: b batch, h query heads, h_kv key/value heads, n tokens, d width of a head, G tokens of a group.
"""

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask


def attend_in_groups(query, key, value, group: int, **sdpa) -> torch.Tensor:
    """Causal attention inside consecutive groups of ``group`` tokens, the last one shorter where n is no multiple.

    The groups become a batch dimension, so one call of the fused kernel serves all of them. The last group is filled up at
    its end, where causality hides the filling.

    Args:
        query, key, value: ``[b, h, n, d]``.
        group: G, in tokens.
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

    out = scaled_dot_product_attention(fold(query), fold(key), fold(value), is_causal=True, **sdpa)
    return out.unflatten(0, (b, -1)).transpose(1, 2).flatten(2, 3)[:, :, :n]


def shifted_sparse_attention(query, key, value, group: int, **sdpa) -> torch.Tensor:
    """S²-Attn: the first half of the heads in groups, the second half in groups shifted by half a group.

    Args:
        query, key, value: ``[b, h, n, d]``, h the same for all three.
        group: G, in tokens, at least 2.
        sdpa: further arguments of ``scaled_dot_product_attention``.

    Returns:
        ``[b, h, n, d]``
    """
    half_of_heads, half_of_group = query.shape[1] // 2, group // 2
    straight, shifted = zip(*(x.tensor_split([half_of_heads], dim=1) for x in (query, key, value)), strict=True)
    first, rest = zip(*(x.tensor_split([half_of_group], dim=2) for x in shifted), strict=True)
    parts = [attend_in_groups(*part, group, **sdpa) for part in (first, rest) if part[0].shape[2]]
    return torch.cat([attend_in_groups(*straight, group, **sdpa), torch.cat(parts, dim=2)], dim=1)


def group_size(num_tokens: int, group_ratio: float) -> int:
    """G of a sequence: its length times ``group_ratio`` (the paper's is 1/4), rounded up, at least 2 tokens."""
    return max(2, -int(-num_tokens * group_ratio // 1))


def register_shifted_sparse_attention(group_ratio: float) -> str:
    """Register S²-Attn with transformers and return its name for ``attn_implementation``.

    It is used in training mode only; in evaluation mode the same model attends fully. Padding at the right needs no mask,
    because causality hides it from every real token.

    Args:
        group_ratio: length of a group as a share of the sequence, 0 < ratio ≤ 1.
    """

    def forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        if not module.training:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
        if attention_mask is not None:
            raise ValueError("shifted sparse attention takes no attention mask: pad at the right and leave the mask out")
        repeats = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)  # [b, h_kv, n, d] -> [b, h, n, d]
        group = group_size(query.shape[2], group_ratio)
        out = shifted_sparse_attention(query, key, value, group, scale=scaling, dropout_p=dropout)
        return out.transpose(1, 2).contiguous(), None  # [b, n, h, d]

    name = f"shifted_sparse_{group_ratio:g}"
    AttentionInterface.register(name, forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, sdpa_mask)
    return name
