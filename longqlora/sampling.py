"""A seeded uniform sample of long texts: bottom-k by a hash of the document.

Every document gets a priority from a hash of the seed and its text; the k smallest priorities among the texts of the right
length are the sample. It depends on the set of documents alone, not on their order or on how they lie in files, a larger k
gives a superset, and equal texts count once.
"""

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Iterator

import pyarrow
import pyarrow.parquet

from longqlora.documents import Document, read_documents
from longqlora.tokens import encode

SCHEMA = pyarrow.schema([("id", "string"), ("source", "string"), ("num_tokens", "int64"), ("text", "string")])


def priority(document_id: str, seed: int) -> int:
    """64 uniform bits from the seed and the document."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{document_id}".encode(), digest_size=8).digest(), "big")


def bottom_k(items: Iterable[tuple[int, str, object]], k: int) -> Iterator[tuple[int, str, object]]:
    """Yield the k items (priority, key, value) of the smallest priorities in their order, one item a key, in O(k) memory."""
    heap, keys = [], set()  # of negated priorities: the largest one kept is at the top
    for order, key, value in items:
        if key in keys or (len(heap) == k and order >= -heap[0][0]):
            continue
        keys.add(key)
        heapq.heappush(heap, (-order, key, value))
        if len(heap) > k:
            keys.remove(heapq.heappop(heap)[1])
    for negated, key, value in sorted(heap, key=lambda item: (-item[0], item[1])):
        yield -negated, key, value


def texts_in_range(
    documents: Iterable[Document], tokenizer, min_tokens: int, max_tokens: int, counts: Counter
) -> Iterator[tuple[Document, int]]:
    """Yield (document, number of tokens) of those with ``min_tokens`` to ``max_tokens`` tokens, and count what is read.

    No tokenizer makes more tokens of a text than it has bytes in UTF-8, so texts with fewer bytes are never tokenised.
    """

    def long_enough() -> Iterator[Document]:
        for document in documents:
            counts["read"] += 1
            if len(document.text.encode("utf-8", "surrogatepass")) < min_tokens:
                counts["too short"] += 1
            else:
                yield document

    pending = []

    def texts() -> Iterator[str]:
        for document in long_enough():
            pending.append(document)
            yield document.text

    for ids in encode(tokenizer, texts()):
        document = pending.pop(0)
        size = "too short" if len(ids) < min_tokens else "too long" if len(ids) > max_tokens else "in range"
        counts[size] += 1
        if size == "in range":
            yield document, len(ids)


def sample_corpus(
    *, sources: list[str], text_field: str, tokenizer, num_texts: int, min_tokens: int, max_tokens: int, seed: int, output: str
) -> dict:
    """Sample texts by their length in tokens and write them as Parquet (id, source, num_tokens, text).

    Args:
        sources: files, see :func:`longqlora.documents.read_documents`.
        text_field: name of the text's field in records.
        tokenizer: of transformers; it counts the tokens.
        num_texts: k, the size of the sample.
        min_tokens, max_tokens: range of a text's length, both ends included.
        seed: of the sample.
        output: path of the Parquet file.

    Returns:
        The data card: counts per outcome and per source of the sample, total tokens, settings.

    Raises:
        ValueError: if there are fewer texts in the range than asked for; the message says how many there are.
    """
    counts = Counter()
    documents = (document for path in sources for document in read_documents(path, text_field))
    found = texts_in_range(documents, tokenizer, min_tokens, max_tokens, counts)
    items = ((priority(document.id, seed), document.id, (document, size)) for document, size in found)
    sample = [value for _, _, value in bottom_k(items, num_texts)]
    if len(sample) < num_texts:
        outcome = ", ".join(f"{number} {name}" for name, number in counts.items())
        raise ValueError(
            f"corpus.num_texts asks for {num_texts} texts of {min_tokens} to {max_tokens} tokens, but the sources hold "
            f"{len(sample)} different ones ({outcome})"
        )
    rows = [{"id": d.id, "source": d.source, "num_tokens": size, "text": d.text} for d, size in sample]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=SCHEMA), output)
    return {
        "texts": {**counts, "sampled": len(sample)},
        "sampled_per_source": dict(Counter(document.source for document, _ in sample).most_common()),
        "sampled_tokens": sum(size for _, size in sample),
        "num_texts": num_texts,
        "min_tokens": min_tokens,
        "max_tokens": max_tokens,
        "seed": seed,
        "sources": sources,
    }
