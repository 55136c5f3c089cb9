"""Texts that are nearly the same: MinHash (Broder 1997, "On the resemblance and containment of documents") by datasketch."""

from datasketch import MinHash, MinHashLSH

from longqlora.data.decontamination import hash_ngrams, words_of

SHINGLE_WORDS = 5
PERMUTATIONS = 128  # of a MinHash: the standard error of a similarity is at most 0.044


class NearDuplicates:
    """Finds among texts those that are nearly the same as one before: MinHash (Broder 1997) over shingles of words.

    Args:
        similarity: Jaccard similarity of two texts' shingles from which on they count as the same, 0 to 1.
    """

    def __init__(self, similarity: float):
        self.similarity, self.signatures = similarity, {}
        weights = (0.1, 0.9)  # of what the index finds in vain and what it misses: what it finds is compared afterwards
        self.index = MinHashLSH(threshold=similarity, num_perm=PERMUTATIONS, weights=weights)
        self.empty = MinHash(num_perm=PERMUTATIONS, hashfunc=int)

    def find_or_add(self, key: str, text: str) -> tuple[str, float] | None:
        """The key of an earlier text that is nearly the same and their estimated similarity; None after adding the text."""
        shingles = hash_ngrams(words_of(text), SHINGLE_WORDS)
        if not len(shingles):  # too few words: nothing can be said, and all such texts have the same signature
            return None
        signature = self.empty.copy()
        signature.update_batch(shingles >> 32)  # of 64 bits the upper ones, as MinHash wants 32
        for other in sorted(self.index.query(signature)):
            similarity = signature.jaccard(self.signatures[other])
            if similarity >= self.similarity:
                return other, similarity
        self.index.insert(key, signature)
        self.signatures[key] = signature
        return None
