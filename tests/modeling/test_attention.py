import pytest
import torch
from conftest import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionInterface,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from longqlora.modeling import attention as attention_module
from longqlora.modeling.attention import (
    group_size,
    register_full_attention,
    register_shifted_sparse_attention,
    shifted_sparse_attention,
)

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def naive_mask(heads: int, n: int, group: int, documents: torch.Tensor | None = None) -> torch.Tensor:
    """[1 or b, h, n, n]: who may see whom, by the definition: same group, same document and not the future; half of the heads
    shifted by G/2."""
    position = torch.arange(n)
    causal = position[:, None] >= position[None, :]
    straight = position // group
    shifted = (position - group // 2) // group  # the first G/2 tokens fall into group -1
    same = [straight[:, None] == straight[None, :]] * (heads // 2) + [shifted[:, None] == shifted[None, :]] * (
        heads - heads // 2
    )
    mask = (torch.stack(same) & causal)[None]
    return mask if documents is None else mask & (documents[:, None, :, None] == documents[:, None, None, :])


def naive_attention(query, key, value, group, documents=None):
    """Scores of all pairs, masked, in plain matrix products; key and value heads are repeated for their query heads."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    scores = scores.masked_fill(~naive_mask(query.shape[1], query.shape[2], group, documents), float("-inf"))
    return scores.softmax(-1) @ value


def random_inputs(b, h, n, d, seed=0, dtype=torch.float32, key_value_heads=None):
    generator = torch.Generator().manual_seed(seed)
    heads = (h, key_value_heads or h, key_value_heads or h)
    return [torch.randn(b, number, n, d, generator=generator, dtype=dtype, requires_grad=True) for number in heads]


def random_documents(b, n, borders, seed):
    """[b, n]: numbers of documents; a token begins one with the probability ``borders``. None of None."""
    if borders is None:
        return None
    return (torch.rand(b, n, generator=torch.Generator().manual_seed(seed)) < borders).cumsum(-1)


def lengths_of(documents: torch.Tensor | None) -> list[list[int]] | None:
    """The lengths of the documents in each row, from their numbers."""
    return None if documents is None else [row.unique_consecutive(return_counts=True)[1].tolist() for row in documents]


def positions_of(*rows: list[int]) -> torch.Tensor:
    """[b, n]: position ids of rows of documents with these lengths, filled up at the right as the trainer does."""
    positions = [torch.cat([torch.arange(length) for length in row]) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(positions, batch_first=True)


def documents_of(positions: torch.Tensor) -> torch.Tensor:
    return (positions == 0).cumsum(-1)


def set_attention(model, attention: str) -> None:
    """Give a model S²-Attn, our full attention, or one of transformers."""
    ours = {"shifted_sparse": lambda: register_shifted_sparse_attention(0.25), "full": register_full_attention}
    model.set_attn_implementation(ours[attention]() if attention in ours else attention)


def tiny_model(family: str):
    """A model of two layers whose four query heads share two key/value heads, in training mode."""
    torch.manual_seed(0)
    config, model = FAMILIES[family]
    shape = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    return model(config(**shape, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)).train()


def hidden_states(model, ids, **kwargs):
    return model.model(ids, use_cache=False, **kwargs).last_hidden_state


@settings(max_examples=100, deadline=None)
@given(
    b=st.integers(1, 3),
    h=st.integers(1, 6),
    shared_by=st.integers(1, 3),
    n=st.integers(1, 40),
    d=st.sampled_from([4, 8]),
    group=st.integers(2, 16),
    borders=st.sampled_from([None, 0.0, 0.1, 0.4, 1.0]),
    seed=st.integers(0, 9),
)
def test_equals_the_naive_reference_forward_and_backward(b, h, shared_by, n, d, group, borders, seed):
    """With key and value heads that each serve ``shared_by`` query heads."""
    key_value_heads = h // shared_by if h % shared_by == 0 else h
    inputs = random_inputs(b, h, n, d, seed, torch.float64, key_value_heads)
    documents = random_documents(b, n, borders, seed)
    output = shifted_sparse_attention(*inputs, group, lengths_of(documents))
    expected = naive_attention(*inputs, group, documents)
    torch.testing.assert_close(output, expected, atol=1e-10, rtol=0)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    gradients = torch.autograd.grad((output * weights).sum(), inputs)
    for gradient, reference in zip(gradients, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, reference, atol=1e-10, rtol=0)


@pytest.mark.parametrize("future", [1, 9, 16, 31])
def test_a_future_token_changes_nothing_before_it(future):
    query, key, value = (x.detach() for x in random_inputs(2, 4, 32, 8))
    before = shifted_sparse_attention(query, key, value, 8)
    for tensor in (query, key, value):
        tensor[:, :, future] += 10.0
    after = shifted_sparse_attention(query, key, value, 8)
    torch.testing.assert_close(after[:, :, :future], before[:, :, :future], atol=0, rtol=0)
    assert not torch.equal(after[:, :, future], before[:, :, future])


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_processes_that_have_a_part_of_the_heads_each_shift_the_second_half_of_all(processes):
    query, key, value = random_inputs(2, 6, 20, 4)
    parts = zip(*(x.chunk(processes, dim=1) for x in (query, key, value)), range(3, -3, -6 // processes), strict=True)
    outputs = [
        shifted_sparse_attention(*part, 8, straight_heads=min(max(straight, 0), 6 // processes)) for *part, straight in parts
    ]
    assert torch.equal(torch.cat(outputs, dim=1), shifted_sparse_attention(query, key, value, 8))


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


@pytest.mark.parametrize("positions", [None, positions_of([9, 20, 1, 5], [3, 25])], ids=["one document", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_every_family_train_by_the_definition_with_shared_heads(family, positions):
    model, ids = tiny_model(family), torch.randint(512, (2, 35))
    documents = None if positions is None else documents_of(positions)
    bias = torch.zeros(2, 4, 35, 35).masked_fill(~naive_mask(4, 35, group_size(35, 0.25), documents), float("-inf"))
    model.set_attn_implementation("eager")
    expected = hidden_states(model, ids, attention_mask=bias, position_ids=positions)
    model.set_attn_implementation(register_shifted_sparse_attention(0.25))
    output = hidden_states(model, ids, position_ids=positions)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
    weights, parameters = torch.randn(output.shape), list(model.model.parameters())
    gradients = torch.autograd.grad((output * weights).sum(), parameters)
    for gradient, reference in zip(gradients, torch.autograd.grad((expected * weights).sum(), parameters), strict=True):
        torch.testing.assert_close(gradient, reference, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("length", [35, 64])
def test_groups_are_a_share_of_the_window_that_is_given(length):
    documents, inputs = random_documents(1, length, 0.05, seed=3), random_inputs(1, 4, length, 8)
    attend = AttentionInterface()[register_shifted_sparse_attention(0.25, window=64)]
    output, _ = attend(torch.nn.Module().train(), *inputs, lengths_of(documents))
    torch.testing.assert_close(output.transpose(1, 2), naive_attention(*inputs, 16, documents), atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["full", "shifted_sparse"])
@pytest.mark.parametrize("family", FAMILIES)
def test_documents_are_found_once_per_pass_and_stay_the_same_when_layers_are_computed_again(monkeypatch, family, attention):
    model, ids, positions = tiny_model(family), torch.randint(512, (2, 35)), positions_of([9, 20, 1, 5], [3, 25])
    parameters, weights = list(model.model.parameters()), torch.randn(2, 35, 32)
    found, find = [], attention_module.document_lengths
    monkeypatch.setattr(attention_module, "document_lengths", lambda begins: found.append(find(begins)) or found[-1])
    set_attention(model, attention)

    def gradients():
        return torch.autograd.grad((hidden_states(model, ids, position_ids=positions) * weights).sum(), parameters)

    expected = gradients()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    for gradient, reference in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(gradient, reference)
    assert found == 2 * [[[9, 20, 1, 5], [3, 25, *7 * [1]]]]  # each token of padding is a document


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_sees_the_future_in_training(family):
    model, ids = tiny_model(family), torch.randint(512, (2, 32))
    model.set_attn_implementation(register_shifted_sparse_attention(0.25))
    before = model(ids).logits
    for future in (1, 8, 13, 31):
        changed = ids.clone()
        changed[:, future:] = (changed[:, future:] + 1) % 512
        after = model(changed).logits
        torch.testing.assert_close(after[:, :future], before[:, :future], atol=1e-6, rtol=0)
        assert not torch.allclose(after[:, future], before[:, future], atol=1e-3)


@pytest.mark.parametrize("attention", ["sdpa", "full", "shifted_sparse"])
def test_no_document_sees_another(attention):
    model, positions = tiny_llama().train(), positions_of([9, 20, 1, 2], [30])  # the second row is one document and padding
    set_attention(model, attention)
    ids, documents = torch.randint(512, positions.shape), documents_of(positions)
    before = hidden_states(model, ids, position_ids=positions)
    for row, number in [(0, 1), (0, 2), (0, 3), (0, 4), (1, 1), (1, 3)]:
        mine = torch.zeros_like(documents, dtype=torch.bool)
        mine[row] = documents[row] == number
        after = hidden_states(model, torch.where(mine, (ids + 1) % 512, ids), position_ids=positions)
        torch.testing.assert_close(after[~mine], before[~mine], atol=1e-6, rtol=0)
        assert not torch.isclose(after[mine], before[mine], atol=1e-3).all(-1).any()


@pytest.mark.parametrize(
    ("attention", "training"), [("sdpa", True), ("sdpa", False), ("full", True), ("full", False), ("shifted_sparse", False)]
)
def test_full_attention_treats_packed_documents_as_if_each_were_alone(attention, training):
    lengths = [[7, 12, 1], [4, 2]]
    model, positions = tiny_llama().train(training), positions_of(*lengths)
    ids = torch.randint(512, positions.shape)
    rows = zip(ids, lengths, strict=True)
    alone = [[hidden_states(model, document[None])[0] for document in row[: sum(cut)].split(cut)] for row, cut in rows]
    set_attention(model, attention)
    packed = hidden_states(model, ids, position_ids=positions)
    assert packed.isfinite().all()
    for row, expected in zip(packed, map(torch.cat, alone), strict=True):
        torch.testing.assert_close(row[: len(expected)], expected, atol=1e-5, rtol=1e-4)


def test_evaluation_takes_the_padding_mask_that_sdpa_takes():
    model, ids = tiny_llama(), torch.randint(512, (2, 16))
    padding = torch.ones_like(ids)
    padding[0, :5] = 0
    expected = model(ids, attention_mask=padding).logits
    model.set_attn_implementation(register_shifted_sparse_attention(0.25))
    torch.testing.assert_close(model(ids, attention_mask=padding).logits, expected)
    generated = model.generate(ids, attention_mask=padding, max_new_tokens=4, do_sample=False)
    model.set_attn_implementation("sdpa")
    assert torch.equal(generated, model.generate(ids, attention_mask=padding, max_new_tokens=4, do_sample=False))


def test_a_sliding_window_within_the_sequence_is_refused_and_a_longer_one_hides_nothing():
    model, positions = tiny_model("mistral"), positions_of([20, 12])
    model.set_attn_implementation(register_shifted_sparse_attention(0.25))
    ids = torch.randint(512, (1, 32))
    expected = hidden_states(model, ids, position_ids=positions)
    model.config.sliding_window = 32
    torch.testing.assert_close(hidden_states(model, ids, position_ids=positions), expected)
    model.config.sliding_window = 8
    for packed in (None, positions):
        with pytest.raises(ValueError, match="a sliding window within its 32 tokens"):
            hidden_states(model.train(), ids, position_ids=packed)
    evaluated = hidden_states(model.eval(), ids, position_ids=positions)
    model.set_attn_implementation("sdpa")
    expected = hidden_states(model, ids, position_ids=positions)
    torch.testing.assert_close(evaluated, expected)
    model.set_attn_implementation(register_full_attention())
    torch.testing.assert_close(hidden_states(model.train(), ids, position_ids=positions), expected)


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *made, 0)
        return out


@pytest.mark.parametrize(("attention", "fits"), [("shifted_sparse", True), ("full", True), ("sdpa", False)])
def test_packed_training_makes_no_mask_of_all_pairs(attention, fits):
    model, n = tiny_llama().train(), 512
    set_attention(model, attention)
    ids, positions = torch.randint(512, (1, n)), positions_of([100, 300, 112])
    with LargestTensor() as largest:
        hidden_states(model, ids, position_ids=positions).sum().backward()
    assert (largest.elements < n * n) == fits
