import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longqlora.config.settings import Protocol
from longqlora.data.token_descriptions import document_spans
from longqlora.evaluation.protocols import Window, make_windows, weighs_windows_equally

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def windows_of(name: str, document_ends: list[int], window: int, stride: int) -> list[Window]:
    return make_windows(document_ends, Protocol(name=name, window=window, stride=stride))


def ends_of(sizes: list[int]) -> list[int]:
    return [sum(sizes[: number + 1]) for number in range(len(sizes))]


def test_windows_written_by_hand():
    """A document of 10 tokens, then one of 3: (document, begin, first scored, end)."""
    assert windows_of("exact", [10, 13], 4, 4) == [(0, 0, 1, 5), (0, 4, 5, 9), (0, 5, 9, 10), (1, 10, 11, 13)]
    assert windows_of("exact", [10], 4, 2) == [(0, 0, 1, 5), (0, 2, 5, 7), (0, 4, 7, 9), (0, 5, 9, 10)]
    assert windows_of("longqlora", [10, 13], 4, 4) == [(0, 0, 1, 4), (0, 4, 5, 8), (0, 8, 9, 12)]
    assert windows_of("longqlora", [10], 4, 4)[-1] == (0, 8, 9, 10)
    assert windows_of("longlora", [10, 13], 4, 2) == [(0, 0, 1, 4), (0, 2, 3, 6), (0, 4, 5, 8), (0, 6, 7, 10)]


@settings(max_examples=300)
@given(sizes=SIZES, window=st.integers(1, 50), data=st.data())
def test_exact_scores_every_token_but_each_documents_first_once_inside_its_document(sizes, window, data):
    stride = data.draw(st.integers(1, window))
    documents = list(document_spans(ends_of(sizes)))
    if max(sizes) == 1:  # no token has one before it
        with pytest.raises(ValueError, match="nothing to score"):
            windows_of("exact", ends_of(sizes), window, stride)
        return
    scored = []
    for document, begin, first, end in windows_of("exact", ends_of(sizes), window, stride):
        own_begin, own_end = documents[document]
        assert own_begin <= begin < first < end <= own_end
        assert end - 1 - begin <= window  # what the model reads
        for token in range(first, end):
            assert token - begin >= min(token - own_begin, window - stride)
        scored += range(first, end)
    assert scored == [token for own_begin, own_end in documents for token in range(own_begin + 1, own_end)]


@given(sizes=SIZES, window=st.integers(2, 50))
def test_longqlora_scores_all_but_the_first_of_each_piece_of_the_stream(sizes, window):
    num_tokens = sum(sizes)
    if num_tokens == 1:
        return
    windows = windows_of("longqlora", ends_of(sizes), window, window)
    scored = [token for part in windows for token in range(part.first, part.end)]
    assert scored == [token for token in range(num_tokens) if token % window]
    assert all(part.end - part.begin <= window for part in windows)


@given(num_tokens=st.integers(3, 300), window=st.integers(2, 50), data=st.data())
def test_longlora_has_full_windows_alone_and_drops_the_last(num_tokens, window, data):
    stride = data.draw(st.integers(1, window))
    starts = list(range(0, num_tokens - window, stride))[:-1]
    if not starts:
        with pytest.raises(ValueError, match="the protocol longlora drops the last windows"):
            windows_of("longlora", [num_tokens], window, stride)
        return
    windows = windows_of("longlora", [num_tokens], window, stride)
    assert windows == [Window(0, start, start + 1, start + window) for start in starts]


@pytest.mark.parametrize("protocol", ["exact", "longqlora"])
def test_a_set_shorter_than_a_window_is_scored(protocol):
    (window,) = windows_of(protocol, [5], 100, 100)
    assert (window.begin, window.end, window.num_scored) == (0, 5, 4)


@pytest.mark.parametrize(
    ("protocol", "ends", "window", "stride", "message"),
    [
        ("exact", [9], 4, 5, "stride 5 must lie between 1 and the window of 4 tokens"),
        ("exact", [9], 4, 0, "stride 0 must lie between 1"),
        ("exact", [1, 2, 3], 4, 4, r"3 token\(s\): nothing to score in windows of 4"),
        ("longqlora", [1], 4, 4, r"1 token\(s\): nothing to score"),
        ("longqlora", [9], 1, 1, "nothing to score in windows of 1"),
        ("longlora", [9], 1, 1, "nothing to score in windows of 1"),
    ],
)
def test_impossible_windows_are_refused(protocol, ends, window, stride, message):
    with pytest.raises(ValueError, match=message):
        windows_of(protocol, ends, window, stride)


@pytest.mark.parametrize(("name", "equally"), [("exact", False), ("longqlora", True), ("longlora", True)])
def test_the_published_protocols_average_over_windows(name, equally):
    assert weighs_windows_equally(Protocol(name=name, window=1024, stride=1024)) is equally
