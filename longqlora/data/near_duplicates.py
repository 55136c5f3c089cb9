"""Near-duplicates: MinHash (Broder 1997, "On the resemblance and containment of documents"), with datasketch."""

from datasketch import MinHash, MinHashLSH

from longqlora.data.decontamination import hash_ngrams, words_of

SHINGLE_WORDS = 5
NUM_PERMUTATIONS = 128  # of a MinHash: the standard error of an estimated similarity is at most 0.044


class NearDuplicates:
    """Finds texts that are nearly the same as an earlier one.

    Args:
        similarity: Jaccard similarity of the word shingles of two near-duplicates, at least; 0 to 1.
    """

    def __init__(self, similarity: float):
        self.similarity = similarity
        self.signatures: dict[str, MinHash] = {}
        weights = (0.1, 0.9)  # of false positives and false negatives: what the index finds is compared afterwards
        self.index = MinHashLSH(threshold=similarity, num_perm=NUM_PERMUTATIONS, weights=weights)
        self.empty = MinHash(num_perm=NUM_PERMUTATIONS, hashfunc=int)

    def find_or_add(self, key: str, text: str) -> tuple[str, float] | None:
        """Look for a near-duplicate among the earlier texts, and add the text if there is none.

        Returns:
            Key of the near-duplicate and the estimated similarity; None if there is none.
        """
        shingles = hash_ngrams(words_of(text), SHINGLE_WORDS)
        if not len(shingles):  # too few words to compare: all such texts have the same signature
            return None
        signature = self.empty.copy()
        signature.update_batch(shingles >> 32)  # the upper half of the 64 bits, because MinHash takes 32
        for other in sorted(self.index.query(signature)):
            similarity = signature.jaccard(self.signatures[other])
            if similarity >= self.similarity:
                return other, similarity
        self.index.insert(key, signature)
        self.signatures[key] = signature
        return None
