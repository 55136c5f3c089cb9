import pytest
import torch
from conftest import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from longqlora.attention import group_size, register_shifted_sparse_attention, shifted_sparse_attention


def naive_mask(heads: int, n: int, group: int) -> torch.Tensor:
    """[h, n, n]: who may see whom, by the definition: same group and not the future; half of the heads shifted by G/2."""
    position = torch.arange(n)
    causal = position[:, None] >= position[None, :]
    straight = position // group
    shifted = (position - group // 2) // group  # the first G/2 tokens fall into group -1
    same = [straight[:, None] == straight[None, :]] * (heads // 2) + [shifted[:, None] == shifted[None, :]] * (
        heads - heads // 2
    )
    return torch.stack(same) & causal


def naive_attention(query, key, value, group):
    """Scores of all pairs, masked, in plain matrix products."""
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    scores = scores.masked_fill(~naive_mask(query.shape[1], query.shape[2], group), float("-inf"))
    return scores.softmax(-1) @ value


def random_inputs(b, h, n, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(b, h, n, d, generator=generator, requires_grad=True) for _ in range(3)]


@settings(max_examples=60, deadline=None)
@given(
    b=st.integers(1, 3),
    h=st.integers(1, 5),
    n=st.integers(1, 40),
    d=st.sampled_from([4, 8]),
    group=st.integers(2, 16),
    seed=st.integers(0, 9),
)
def test_equals_the_naive_reference_forward_and_backward(b, h, n, d, group, seed):
    inputs = random_inputs(b, h, n, d, seed)
    output, expected = shifted_sparse_attention(*inputs, group), naive_attention(*inputs, group)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed + 1))
    gradients = torch.autograd.grad((output * weights).sum(), inputs)
    for gradient, reference in zip(gradients, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, reference, atol=1e-5, rtol=0)


@pytest.mark.parametrize("future", [1, 9, 16, 31])
def test_a_future_token_changes_nothing_before_it(future):
    query, key, value = (x.detach() for x in random_inputs(2, 4, 32, 8))
    before = shifted_sparse_attention(query, key, value, 8)
    for tensor in (query, key, value):
        tensor[:, :, future] += 10.0
    after = shifted_sparse_attention(query, key, value, 8)
    torch.testing.assert_close(after[:, :, :future], before[:, :, :future], atol=0, rtol=0)
    assert not torch.equal(after[:, :, future], before[:, :, future])


def test_half_of_the_heads_carry_information_across_a_group_border():
    query, key, value = (x.detach() for x in random_inputs(1, 4, 32, 8))
    before = shifted_sparse_attention(query, key, value, 8)
    value[:, :, 7] += 10.0  # the last token of the first group
    changed = (shifted_sparse_attention(query, key, value, 8) != before).any(-1)[0]  # [h, n]
    assert not changed[:2, 8:].any()
    assert changed[2:, 8:12].all()


@pytest.mark.parametrize(
    ("tokens", "ratio", "group"), [(8192, 0.25, 2048), (256, 0.25, 64), (10, 0.25, 3), (3, 0.25, 2), (100, 1.0, 100)]
)
def test_group_size(tokens, ratio, group):
    assert group_size(tokens, ratio) == group


def test_one_group_of_the_whole_sequence_is_full_attention_for_the_straight_heads():
    query, key, value = random_inputs(1, 2, 16, 8)
    full = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(shifted_sparse_attention(query, key, value, 16)[:, :1], full[:, :1])


@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
def test_a_model_trains_sparsely_with_grouped_query_heads_and_evaluates_fully(key_value_heads):
    model = tiny_llama(num_key_value_heads=key_value_heads)
    ids = torch.randint(512, (2, 32))
    full = model(ids).logits
    model.set_attn_implementation(register_shifted_sparse_attention(0.25))
    torch.testing.assert_close(model(ids).logits, full, atol=1e-5, rtol=1e-4)
    sparse = model.train()(ids).logits
    torch.testing.assert_close(sparse[:, :4], full[:, :4], atol=1e-4, rtol=1e-4)  # nobody has left its group yet
    assert not torch.allclose(sparse[:, 8:], full[:, 8:], atol=1e-3)
    ids[:, 20] += 1
    torch.testing.assert_close(model(ids % 512).logits[:, :20], sparse[:, :20], atol=1e-5, rtol=1e-4)


def test_right_padding_changes_no_real_token():
    model = tiny_llama()
    model.set_attn_implementation(register_shifted_sparse_attention(0.25))
    model.train()
    ids = torch.randint(512, (1, 32))
    filled = ids.clone()
    filled[:, 25:] = 0
    torch.testing.assert_close(model(filled).logits[:, :25], model(ids).logits[:, :25], atol=1e-5, rtol=1e-4)


def test_an_attention_mask_is_refused():
    model = tiny_llama()
    model.set_attn_implementation(register_shifted_sparse_attention(0.25))
    mask = torch.ones(1, 16, dtype=torch.long)
    mask[:, :4] = 0
    with pytest.raises(ValueError, match="takes no attention mask"):
        model.train()(torch.randint(512, (1, 16)), attention_mask=mask)
