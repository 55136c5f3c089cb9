from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from longqlora.evaluation import token_losses
from longqlora.evaluation.token_losses import batches_of


@given(lengths=st.lists(st.integers(0, 300), max_size=50), tokens_per_batch=st.integers(1, 512))
def test_batches_hold_every_sequence_once_and_no_more_tokens_than_allowed(lengths, tokens_per_batch):
    with patch.object(token_losses, "TOKENS_PER_BATCH", tokens_per_batch):
        batches = batches_of(lengths)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    in_order = [lengths[index] for batch in batches for index in batch]
    assert in_order == sorted(in_order, reverse=True)
    assert all(len(batch) == 1 or lengths[batch[0]] * len(batch) <= tokens_per_batch for batch in batches)
