"""Perplexity protocols: which windows a model reads, which of their tokens are scored, and how losses are averaged.

* ``exact``: every token of a document but its first is scored exactly once. No window crosses a document boundary. The mean is
  over tokens. With a stride below the window, the model sees at least ``window - stride`` tokens before each scored token, or
  all of the document before it if that is less.
* ``longqlora`` (arXiv 2311.04879, ``component/dataset.py`` of its repository): the whole set is one stream, cut into windows
  (stride = window); the last one may be shorter. The first token of a window is not scored. The mean is over the means of the
  windows.
* ``longlora`` (arXiv 2309.12307, ``eval.py`` of its repository): the whole set is one stream, with a window every ``stride``
  tokens (256 in the published code). Each window scores **all** of its tokens but the first, so overlapping windows score a
  token several times. The windows at the end of the stream are dropped. The mean is over the means of the windows.
"""

from collections.abc import Iterator
from typing import NamedTuple

from longqlora.config.settings import Protocol
from longqlora.data.token_descriptions import document_spans


class Window(NamedTuple):
    """The model reads the tokens [begin, end - 1) of the stream; its predictions of the tokens [first, end) are scored."""

    document: int
    begin: int
    first: int
    end: int

    @property
    def num_read(self) -> int:
        """Number of tokens that the model reads."""
        return self.end - self.begin - 1

    @property
    def num_scored(self) -> int:
        """Number of scored tokens."""
        return self.end - self.first


def weighs_windows_equally(protocol: Protocol) -> bool:
    """Whether a protocol averages over windows rather than over tokens."""
    return protocol.name != "exact"


def make_windows(document_ends: list[int], protocol: Protocol) -> list[Window]:
    """The windows of an evaluation set, in the order of its tokens.

    Args:
        document_ends: index after the last token of each document; the last one is the length of the stream.
        protocol: how perplexity is measured.

    Raises:
        ValueError: if the stride is below 1 or above the window, or there is no token to score.
    """
    window, stride = protocol.window, protocol.stride
    if not 1 <= stride <= window:  # windows would overlap endlessly, or skip tokens without a word
        raise ValueError(f"stride {stride} must lie between 1 and the window of {window} tokens")
    num_tokens = document_ends[-1]
    if protocol.name == "exact":
        windows = [
            part
            for number, (begin, end) in enumerate(document_spans(document_ends))
            for part in rolling_windows(number, begin, end, window, stride)
        ]
    elif protocol.name == "longqlora":
        starts = range(0, num_tokens - 1, window)
        windows = [Window(0, start, start + 1, min(start + window, num_tokens)) for start in starts if window > 1]
    else:
        complete = range(0, num_tokens - window, stride)[:-1]
        windows = [Window(0, start, start + 1, start + window) for start in complete if window > 1]
    if not windows:
        dropped = "; the protocol longlora drops the last windows" if protocol.name == "longlora" else ""
        raise ValueError(f"{num_tokens} token(s): nothing to score in windows of {window}{dropped}")
    return windows


def rolling_windows(document: int, begin: int, end: int, window: int, stride: int) -> Iterator[Window]:
    """Windows over one document: the first scores every token it can, each further one the next ``stride`` tokens."""
    scored = begin + 1  # no token precedes the first one, so it cannot be predicted
    while scored < end:
        last = min(scored + (window if scored == begin + 1 else stride), end)
        yield Window(document, max(begin, last - 1 - window), scored, last)
        scored = last
