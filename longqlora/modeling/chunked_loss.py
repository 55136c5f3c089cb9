"""The loss of a language model that never holds the logits of a whole window."""

from types import MethodType

import torch
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import linear_cross_entropy
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from longqlora.data.token_files import IGNORED

CHUNKED = LinearCrossEntropyOptions(batch_chunk_size=512, chunking_method=None)
"""Tokens whose logits exist at once: torch's own choice, some 32 for a vocabulary of 32,000, takes twice as long on a CPU."""


def next_token_loss(model: PreTrainedModel, input_ids, labels, num_items_in_batch=None, **kwargs) -> torch.Tensor:
    """Cross-entropy of the next token from the hidden states, in chunks, so that the logits of a window never exist at once.

    Args:
        model: a causal language model of transformers.
        input_ids: ``[b, n]``
        labels: ``[b, n]``, the ids to predict at their own places (shifted in here), -100 where nothing is to be learned.
        num_items_in_batch: number of labels to divide by; None: those of this batch.
        kwargs: to the decoder.

    Returns:
        Scalar: the summed loss over the number of labels.
    """
    hidden = model.base_model(input_ids=input_ids, use_cache=False, **kwargs).last_hidden_state[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten()
    weight = model.get_output_embeddings().weight
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    total = summed_nll(hidden, weight, targets)
    count = num_items_in_batch if num_items_in_batch is not None else (targets != IGNORED).sum()
    return total / torch.as_tensor(count).clamp(min=1)  # nothing to learn is no loss; 0 / 0 would spoil the whole adapter


def summed_nll(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of tokens from the hidden states before them, summed in float32, in chunks of tokens.

    Args:
        hidden: ``[n, width]``
        weight: ``[vocabulary, width]``, of the output layer.
        targets: ``[n]``, -100 where a token does not count.
    """
    # a sum comes with its gradient, so that no logits are computed twice; but one in bfloat16 would keep two digits
    reduction = "sum" if hidden.dtype is torch.float32 else "none"
    return linear_cross_entropy(hidden, weight, targets, reduction=reduction, options=CHUNKED).float().sum()


def use_chunked_loss(model: PreTrainedModel) -> PreTrainedModel:
    """Make ``model(input_ids, labels=…)`` compute its loss by :func:`next_token_loss` and return no logits, so that trainers
    and wrappers that call the model get it."""

    def forward(self, input_ids, labels, num_items_in_batch=None, **kwargs):
        return CausalLMOutput(loss=next_token_loss(self, input_ids, labels, num_items_in_batch, **kwargs))

    model.forward = MethodType(forward, model)
    return model
