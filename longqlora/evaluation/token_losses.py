"""The loss of every token of a batch, and which sequences form one."""

import torch
from torch.nn.functional import cross_entropy

TOKENS_PER_BATCH = 8192  # tokens of one forward pass, so that short sequences use the hardware as well as long ones
POSITIONS_PER_CHUNK = 1024  # positions whose float32 logits are in memory at the same time


class NonFiniteLogits(ValueError):
    """A model's logits contain NaN or infinite values."""


def batches_of(lengths: list[int]) -> list[list[int]]:
    """Group sequences of similar length into batches of at most :data:`TOKENS_PER_BATCH` tokens.

    Args:
        lengths: number of tokens that a model reads of each sequence.

    Returns:
        Indices of the sequences of each batch, the longest ones first, so that a lack of memory shows at once.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > TOKENS_PER_BATCH:
            batches.append([])
        batches[-1].append(index)
    return batches


@torch.inference_mode()
def nll_of_batch(model, tokens: torch.Tensor, skipped: int = 0) -> torch.Tensor:
    """Negative log-likelihood of each token given those before it; logits are computed for a chunk of positions at a time.

    Args:
        model: a causal language model of transformers.
        tokens: ``[b, n + 1]``; the targets are the inputs shifted by one. Shorter rows are padded on the right, where a causal
            model cannot see the padding from any real token.
        skipped: number of leading targets to leave out.

    Returns:
        ``[b, n - skipped]``, float32, in nats.
    """
    hidden = model.base_model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state[:, skipped:]  # [b, s, width]
    head, losses = model.get_output_embeddings(), []
    positions = max(1, POSITIONS_PER_CHUNK // len(tokens))
    for states, targets in zip(hidden.split(positions, 1), tokens[:, 1 + skipped :].split(positions, 1), strict=True):
        logits = head(states).float()  # [b, positions, vocabulary]
        losses.append(cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets))
    return torch.cat(losses, dim=1)
