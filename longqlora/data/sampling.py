"""Seeded uniform samples: bottom-k by a hash.

Every item gets a priority from a hash of the seed and its own key; the k smallest priorities are the sample. It depends on the
set of items alone, not on their order or on how they lie in files: each part keeps its k smallest, and the k smallest of those
are the k smallest of all. A larger k gives a superset, and items of equal keys count once.
"""

import hashlib
import heapq
import tempfile
from collections.abc import Iterator
from pathlib import Path

import orjson

NUM_PRIORITIES = 2**64


def priority(key: str, seed: int) -> int:
    """64 uniform bits from the seed and the key of an item."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest(), "big")


def apportion(total: int, shares: dict[str, float]) -> dict[str, int]:
    """Divide ``total`` by shares into whole numbers that add up to it, by the method of Sainte-Laguë.

    It grows one by one: each further item goes to the part that is furthest behind, so no part of a larger total is smaller.

    Args:
        total: what is divided.
        shares: of each part, not negative.
    """
    parts = dict.fromkeys(shares, 0)
    queue = [(0.5 / share, number, name) for number, (name, share) in enumerate(shares.items()) if share > 0]
    heapq.heapify(queue)
    for _ in range(total):
        _, number, name = queue[0]
        parts[name] += 1
        heapq.heapreplace(queue, ((parts[name] + 0.5) / shares[name], number, name))
    return parts


class BottomK:
    """The k items of the smallest priorities, one a key, in memory that grows with k alone: their values lie in a temporary
    file. Where two values come under one key, the smaller one stays (field by field), whichever came first.

    Args:
        k: how many items are kept.
        folder: for the temporary file; some k · (1 + ln(n / k)) values of n items pass through it.
    """

    def __init__(self, k: int, folder: str | Path):
        self.k = k
        self.heap: list[tuple[int, str]] = []  # of negated priorities: the largest one kept is at the top
        self.places: dict[str, tuple[int, int]] = {}  # key → offset and number of bytes of the value
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it lives as long as the object

    @property
    def threshold(self) -> int:
        """Items of this priority or a larger one are no longer taken."""
        if len(self.heap) < self.k:
            return NUM_PRIORITIES
        return -self.heap[0][0] + 1 if self.k else 0  # + 1: another value may come under the key of the last one kept

    def add(self, order: int, key: str, value: dict) -> None:
        """Offer an item; ``order`` is its priority."""
        if order >= self.threshold:
            return
        if key in self.places:
            if [*value.values()] < [*self.read(key).values()]:
                self.places[key] = self.write(value)
            return
        self.places[key] = self.write(value)
        heapq.heappush(self.heap, (-order, key))
        if len(self.heap) > self.k:
            del self.places[heapq.heappop(self.heap)[1]]

    def write(self, value: dict) -> tuple[int, int]:
        """Put a value at the end of the file; return where it lies."""
        return self.file.seek(0, 2), self.file.write(orjson.dumps(value))

    def read(self, key: str) -> dict:
        """The value of an item that is kept."""
        offset, size = self.places[key]
        self.file.seek(offset)
        return orjson.loads(self.file.read(size))

    def __iter__(self) -> Iterator[tuple[int, str, dict]]:
        """Yield (priority, key, value) by priority."""
        for negated, key in sorted(self.heap, key=lambda item: (-item[0], item[1])):
            yield -negated, key, self.read(key)
