"""The loss of a language model, computed in chunks, so that the logits of a whole window are never in memory."""

from types import MethodType

import torch
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import linear_cross_entropy
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from longqlora.data.token_files import IGNORED

CHUNK = 512  # tokens whose logits are in memory at a time
CHUNKED = LinearCrossEntropyOptions(batch_chunk_size=CHUNK, chunking_method=None)
"""Logits are computed for 512 tokens at once. The default, about 32 for a vocabulary of 32,000, is half as fast on a CPU."""


def next_token_loss(model: PreTrainedModel, input_ids, labels, num_items_in_batch=None, **kwargs) -> torch.Tensor:
    """Cross-entropy of the next token, computed from the hidden states in chunks.

    Args:
        model: a causal language model of transformers.
        input_ids: ``[b, n]``
        labels: ``[b, n]``, the ids to predict at their own positions (shifted here), -100 where nothing is to be learned; or
            ``[b, n + 1]``, where the last one is predicted from the last token.
        num_items_in_batch: number of labels to divide by; None: those of this batch.
        kwargs: to the decoder.

    Returns:
        Scalar: the summed loss divided by the number of labels.
    """
    hidden = model.base_model(input_ids=input_ids, use_cache=False, **kwargs).last_hidden_state
    hidden, targets = hidden[:, : labels.shape[1] - 1].flatten(0, 1), labels[:, 1:].flatten()
    weight = model.get_output_embeddings().weight
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    total = summed_nll(hidden, weight, targets)
    count = num_items_in_batch if num_items_in_batch is not None else (targets != IGNORED).sum()
    return total / torch.as_tensor(count).clamp(min=1)  # without labels the loss is 0; 0 / 0 would make the whole adapter NaN


def summed_nll(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of tokens, summed in float32 and computed in chunks of tokens.

    Args:
        hidden: ``[n, width]``, the hidden states that predict the targets.
        weight: ``[vocabulary, width]``, of the output layer.
        targets: ``[n]``, token ids, -100 where a token does not count.
    """
    # for a sum, torch computes the gradient in the same pass and no logits twice; but a sum in bfloat16 would have two digits
    reduction = "sum" if hidden.dtype is torch.float32 else "none"
    return linear_cross_entropy(hidden, weight, targets, reduction=reduction, options=CHUNKED).float().sum()


def use_chunked_loss(model: PreTrainedModel) -> PreTrainedModel:
    """Replace the model's ``forward``: ``model(input_ids, labels=…)`` then returns the loss of :func:`next_token_loss` and no
    logits, also to trainers and wrappers that call the model."""

    def forward(self, input_ids, labels, num_items_in_batch=None, **kwargs):
        return CausalLMOutput(loss=next_token_loss(self, input_ids, labels, num_items_in_batch, **kwargs))

    model.forward = MethodType(forward, model)
    return model
