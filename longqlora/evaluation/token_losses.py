"""The loss of every token of a batch, for perplexity and for retrieval without an answer in words."""

import torch
from torch.nn.functional import cross_entropy

POSITIONS_PER_CHUNK = 1024  # positions whose float32 logits are in memory at the same time


class NonFiniteLogits(ValueError):
    """A model's logits contain NaN or infinite values."""


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
