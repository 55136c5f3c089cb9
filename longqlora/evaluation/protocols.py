"""Protocols of perplexity: which windows a model reads, which of their tokens count, and how the losses become one number.

* ``exact``: every token of a document but its first is scored exactly once; no window crosses the end of a document; the mean
  is over tokens. With a stride below the window each token has at least ``window - stride`` tokens before it where the
  document has them.
* ``longqlora`` (arXiv 2311.04879, ``component/dataset.py`` of its repository): the whole set is one stream, cut into windows
  (stride = window), the last one as long as it comes; a window's first token is not scored; mean of the windows' means.
* ``longlora`` (arXiv 2309.12307, ``eval.py`` of its repository): the whole set is one stream, a window every ``stride`` tokens,
  256 as published, of which **all** tokens but the first count again; the last windows are dropped; mean of the windows' means.
"""

from collections.abc import Iterator
from typing import NamedTuple

PROTOCOLS = ("exact", "longqlora", "longlora")
LONGLORA_STRIDE = 256


class Window(NamedTuple):
    """The model reads the tokens [begin, end - 1) of the stream; its predictions of the tokens [first, end) are scored."""

    document: int
    begin: int
    first: int
    end: int

    @property
    def num_scored(self) -> int:
        """Number of scored tokens."""
        return self.end - self.first


def stride_of(protocol: str, window: int, stride: int | None) -> int:
    """Tokens from one window to the next, by the protocol where ``stride`` is None."""
    if stride is None:
        return LONGLORA_STRIDE if protocol == "longlora" else window
    return stride


def weighs_windows_equally(protocol: str) -> bool:
    """Whether the mean is over windows, not over tokens."""
    return protocol != "exact"


def make_windows(protocol: str, document_ends: list[int], window: int, stride: int) -> list[Window]:
    """The windows of an evaluation set, in the order of its tokens.

    Args:
        protocol: one of :data:`PROTOCOLS`.
        document_ends: index after the last token of each document; the last is the length of the stream.
        window: tokens that a model reads at once.
        stride: tokens from one window to the next, 1 ≤ stride ≤ window; the window itself with ``longqlora``.

    Raises:
        ValueError: if the stride is not in that range, or there is no token to score.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r} is unknown; known are {', '.join(PROTOCOLS)}")
    if not 1 <= stride <= window:
        raise ValueError(f"stride {stride} must lie between 1 and the window of {window} tokens")
    if protocol == "longqlora" and stride != window:
        raise ValueError(f"stride {stride}: in the protocol longqlora the stride is the window, here {window}")
    num_tokens = document_ends[-1]
    if protocol == "exact":
        windows = [
            part for number, ends in enumerate(spans(document_ends)) for part in rolling_windows(number, *ends, window, stride)
        ]
    elif protocol == "longqlora":
        starts = range(0, num_tokens - 1, window)
        windows = [Window(0, start, start + 1, min(start + window, num_tokens)) for start in starts if window > 1]
    else:
        starts = range(0, num_tokens - window, stride)[:-1]
        windows = [Window(0, start, start + 1, start + window) for start in starts if window > 1]
    if not windows:
        dropped = ", of which the protocol longlora drops the last ones" if protocol == "longlora" else ""
        raise ValueError(f"{num_tokens} token(s): nothing to score in windows of {window}{dropped}")
    return windows


def spans(ends: list[int]) -> Iterator[tuple[int, int]]:
    """Begin and end of each document."""
    return zip([0, *ends], ends, strict=False)


def rolling_windows(document: int, begin: int, end: int, window: int, stride: int) -> Iterator[Window]:
    """Windows over one document: the first scores all it can, each further one the next ``stride`` tokens."""
    done = begin + 1  # the first token has nothing before it
    while done < end:
        last = min(done + (window if done == begin + 1 else stride), end)
        yield Window(document, max(begin, last - 1 - window), done, last)
        done = last
