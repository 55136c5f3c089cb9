"""Segments against masks, and what is moved and computed for them."""

from collections import Counter
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from longqlora.modeling import segments
from longqlora.modeling.segments import attend_in_segments, computed_at_once, lengths_of_segments


@pytest.mark.parametrize(
    ("cuts", "documents", "lengths"),
    [
        (range(0), [7], [7]),
        (range(4, 12, 4), [12], [4, 4, 4]),
        (range(4, 11, 4), [11], [4, 4, 3]),
        (range(2, 12, 4), [12], [2, 4, 4, 2]),
        (range(0), [5, 5, 2, 1, 1, 1], [5, 5, 2, 1, 1, 1]),
        (range(4, 12, 4), [3, 9], [3, 1, 4, 4]),
        (range(4, 12, 4), [4, 8], [4, 4, 4]),
    ],
)
def test_segments_end_at_cuts_and_documents(cuts, documents, lengths):
    assert lengths_of_segments(cuts, documents) == lengths


@pytest.mark.parametrize(
    ("lengths", "runs"),
    [
        ([300], [[300]]),
        ([512, 512, 400], [[512, 512], [400]]),
        ([32, 64, 64, 64, 32], [[32], [64, 64, 64], [32]]),
        ([100, 90, 80, 70], [[100, 90, 80], [70]]),
        ([100, 300, 20], [[100], [300], [20]]),
        ([1] * 600, [[1] * 256, [1] * 256, [1] * 88]),  # padding
    ],
    ids=["long", "equal", "groups", "short", "short beside long", "tokens"],
)
def test_neighbors_of_equal_length_and_short_ones_are_computed_at_once(lengths, runs):
    assert list(computed_at_once(lengths)) == runs


def lengths(n: int):
    """Strategy for lengths of documents that together have n tokens."""
    borders = st.sets(st.integers(1, n - 1), max_size=6) if n > 1 else st.just(set())
    return borders.map(sorted).map(lambda inside: [end - begin for begin, end in zip([0, *inside], [*inside, n], strict=True)])


@st.composite
def rows_of_documents(draw):
    b, n = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    return b, n, draw(st.one_of(st.none(), st.lists(lengths(n), min_size=b, max_size=b)))


@settings(max_examples=100, deadline=None)
@given(
    rows=rows_of_documents(),
    short=st.sampled_from([1, 8, 256]),
    key_value_heads=st.integers(1, 3),
    shared_by=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_full_attention_inside_documents_is_that_with_a_mask(rows, short, key_value_heads, shared_by, seed):
    (b, n, documents), h = rows, key_value_heads * shared_by
    generator = torch.Generator().manual_seed(seed)
    query, key, value, weights = (
        torch.randn(b, heads, n, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (h, key_value_heads, key_value_heads, h)
    )
    with patch.multiple(segments, SHORT=short, FOLDED=max(2, short // 8)):
        output = attend_in_segments(query, key, value, [(slice(0, h), range(0))], documents, scale=0.3)
    of_documents = [torch.block_diag(*(torch.ones(m, m) for m in row)).tril().bool() for row in documents or [[n]] * b]
    mask = torch.stack(of_documents)[:, None]  # [b, 1, n, n]
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(output, expected, atol=1e-10, rtol=0)
    found, references = (torch.autograd.grad((out * weights).sum(), (query, key, value)) for out in (output, expected))
    for gradient, reference in zip(found, references, strict=True):
        torch.testing.assert_close(gradient, reference, atol=1e-10, rtol=0)


class Operations(TorchDispatchMode):
    """Counts the elements that operations write, without those that only make another view; and the segments that the fused
    kernel computes, by length, for each head."""

    views = ("view", "transpose", "slice", "detach", "alias", "unsqueeze", "empty")

    def __init__(self):
        super().__init__()
        self.written, self.segments = Counter(), Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        name = function.__name__.split(".")[0]
        if "flash_attention" in name and "backward" not in name:
            assert not (keywords or {}).get("attn_mask")
            batch, heads, length, _ = arguments[0].shape
            self.segments[length] += batch * heads
        elif "attention" not in name and not any(view in name for view in self.views):
            self.written[name] += result.numel()
        return result


HALVES = [(slice(0, 2), range(16, 64, 16)), (slice(2, 4), range(8, 64, 16))]


@pytest.mark.parametrize(
    ("rows", "documents", "computed"),  # segments of each length, for all heads of all rows
    [
        (1, None, {16: 2 * 4 + 2 * 3, 8: 2 * 2}),
        (3, None, {16: 3 * (2 * 4 + 2 * 3), 8: 3 * 2 * 2}),
        (1, [[40, 24]], {16: 2 * 3 + 2 * 3, 8: 2 * 2 + 2 * 2}),
        (2, [[64], [16, 48]], {16: 2 * (4 + 4) + 2 * (3 + 2), 8: 2 * (2 + 4)}),
    ],
    ids=str,
)
def test_kernels_take_segments_without_masks_and_every_output_and_gradient_is_copied_once(
    rows, documents, computed, monkeypatch
):
    monkeypatch.setattr(segments, "SHORT", 8)
    monkeypatch.setattr(segments, "FOLDED", 8)
    inputs = [torch.randn(rows, 64, 4, 8).transpose(1, 2).requires_grad_() for _ in range(3)]
    weights = torch.randn(rows, 64, 4, 8).transpose(1, 2)
    with Operations() as operations:
        output = attend_in_segments(*inputs, HALVES, documents)
        output.backward(weights)
    assert operations.written == {"copy_": 4 * rows * 64 * 4 * 8}
    assert output.transpose(1, 2).is_contiguous()
    assert operations.segments == computed


def test_of_short_documents_only_few_calls_compute_pairs():
    """A call of a kernel for each of 600 tokens, or a batch of them, would take a GPU much time or memory."""
    query, key, value = (torch.randn(1, 4, 1024, 8, requires_grad=True) for _ in range(3))
    calls: list[torch.Size] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def counted(query, *arguments, **options):
        calls.append(query.shape)
        return attend(query, *arguments, **options)

    with patch.object(segments, "scaled_dot_product_attention", counted):
        output = attend_in_segments(query, key, value, HALVES_OF_1024, [[424] + [1] * 600])
    output.sum().backward()
    assert len(calls) <= 12
    assert all(batch <= 4 and length < 2 * segments.SHORT for batch, _, length, _ in calls)
    assert torch.allclose(output[:, :, 424:], value[:, :, 424:])
    for gradient, expected in ((query.grad, 0), (key.grad, 0), (value.grad, 1)):
        assert torch.allclose(gradient[:, :, 424:], torch.full_like(gradient[:, :, 424:], expected), atol=1e-6)


HALVES_OF_1024 = [(slice(0, 2), range(256, 1024, 256)), (slice(2, 4), range(128, 1024, 256))]
