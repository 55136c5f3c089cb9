"""Seeded uniform samples: bottom-k by hash.

Every item gets a priority, a hash of the seed and the item's key; the k items of the smallest priorities are the sample. The
sample depends on the set of items only, neither on their order nor on the files that they are in: each part of the data keeps
its k smallest, and the k smallest of these are the k smallest of all. A larger k gives a superset, and items with equal keys
count once.
"""

import hashlib
import heapq
import tempfile
from collections.abc import Iterator
from pathlib import Path

import orjson
import xxhash

NUM_PRIORITIES = 2**64


def text_id(text: str) -> str:
    """Id of a text: a 128-bit hash (XXH3) of it, in hexadecimal. Equal texts have equal ids."""
    return xxhash.xxh3_128_hexdigest(text.encode())  # every text that may be in range is hashed: ten times as fast as SHA


def priority(key: str, seed: int) -> int:
    """Priority of an item: 64 uniform bits from the seed and the item's key."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest(), "big")


def apportion(total: int, shares: dict[str, float]) -> dict[str, int]:
    """Divide ``total`` into whole numbers in proportion to shares (Sainte-Laguë method); they add up to ``total``.

    Units are assigned one by one, each to the part that is furthest below its share, so a larger total makes no part smaller.

    Args:
        total: number to divide.
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
    """The k items of the smallest priorities, each key once. Values are in a temporary file, so memory grows with k only.

    If two values have the same key, the smaller one (compared field by field) is kept, whatever their order.

    Args:
        k: number of items to keep.
        folder: for the temporary file; of n items about k · (1 + ln(n / k)) values are written to it.
    """

    def __init__(self, k: int, folder: str | Path):
        self.k = k
        self.heap: list[tuple[int, str]] = []  # (negated priority, key): the item of the largest priority is on top
        self.locations: dict[str, tuple[int, int]] = {}  # key → offset and number of bytes of its value
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it lives as long as the object

    @property
    def threshold(self) -> int:
        """Items of this or a larger priority are not kept."""
        if len(self.heap) < self.k:
            return NUM_PRIORITIES
        return -self.heap[0][0] + 1 if self.k else 0  # + 1: the last key kept may come again with a smaller value

    def add(self, item_priority: int, key: str, value: dict) -> None:
        """Offer an item; it is kept if its priority is among the k smallest so far."""
        if item_priority >= self.threshold:
            return
        if key in self.locations:
            if [*value.values()] < [*self.read(key).values()]:
                self.locations[key] = self.write(value)
            return
        self.locations[key] = self.write(value)
        heapq.heappush(self.heap, (-item_priority, key))
        if len(self.heap) > self.k:
            del self.locations[heapq.heappop(self.heap)[1]]

    def write(self, value: dict) -> tuple[int, int]:
        """Append a value to the file; return its offset and its number of bytes."""
        return self.file.seek(0, 2), self.file.write(orjson.dumps(value))

    def read(self, key: str) -> dict:
        """Value of an item that is kept."""
        offset, size = self.locations[key]
        self.file.seek(offset)
        return orjson.loads(self.file.read(size))

    def __iter__(self) -> Iterator[tuple[int, str, dict]]:
        """Yield (priority, key, value) in the order of priorities."""
        for negated, key in sorted(self.heap, key=lambda item: (-item[0], item[1])):
            yield -negated, key, self.read(key)
