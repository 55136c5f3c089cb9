"""The gate between training texts and evaluation sets: a text that shares n-grams of words with an evaluation set is not
trained on (after Brown et al. 2020, arXiv 2005.14165, appendix C, who look for 13-grams).

Words are runs of letters, digits and underscores in lower case, so that layout and punctuation do not hide a copy. An n-gram is
known by a 64-bit hash; two different ones of 10⁷ and 10¹⁰ share a hash with a probability of 0.5 %, and what that costs is one
clean text.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy
import pandas
import pyarrow
import pyarrow.parquet

from longqlora.data.token_descriptions import read_description
from longqlora.data.token_files import read_tokens

WORD = re.compile(r"\w+")
MULTIPLIER = numpy.uint64(0x9E3779B97F4A7C15)  # odd, its bits well mixed (2⁶⁴ / golden ratio)
TOKENS_PER_PIECE = 2**18  # of a stream decoded at once
TOKENS_OF_OVERLAP = 2**10  # between two pieces: more than n words have
SCHEMA = pyarrow.schema(
    [("evaluation_set", pyarrow.dictionary(pyarrow.int32(), pyarrow.string())), ("ngram", pyarrow.uint64())]
)


@dataclass(frozen=True)
class Overlap:
    """What a text has in common with an evaluation set.

    Attributes:
        evaluation_set: name of the set.
        shared_ngrams: how many different n-grams of the text are in the set.
        num_ngrams: how many different n-grams the text has.
        example: the first shared n-gram, as words.
    """

    evaluation_set: str
    shared_ngrams: int
    num_ngrams: int
    example: str


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return WORD.findall(text.lower())


def hash_ngrams(words: list[str], n: int) -> numpy.ndarray:
    """Hashes of the n-grams of consecutive words, ``[max(0, words - n + 1)]``: polynomials in the words' hashes, mod 2⁶⁴."""
    hashes = pandas.util.hash_array(numpy.array(words, dtype=object), categorize=False)  # [words], the same on every machine
    ngrams = numpy.zeros(max(0, len(words) - n + 1), dtype=numpy.uint64)
    for offset in range(n if len(ngrams) else 0):
        ngrams = ngrams * MULTIPLIER + hashes[offset : offset + len(ngrams)]
    return ngrams


class EvaluationNgrams:
    """The n-grams of an experiment's evaluation sets, to hold texts against.

    Args:
        path: file of :func:`index_evaluation_sets`.
        threshold: number of shared n-grams from which on a text counts as contaminated.
    """

    def __init__(self, path: str, threshold: int):
        table = pyarrow.parquet.read_table(path)
        self.n, self.threshold = int(table.schema.metadata[b"n"]), threshold
        names, ngrams = table.column("evaluation_set").to_numpy(), table.column("ngram").to_numpy()
        self.sets = {name: ngrams[names == name] for name in dict.fromkeys(names)}  # each sorted

    def overlaps(self, text: str) -> list[Overlap]:
        """The evaluation sets with which a text shares ``threshold`` n-grams or more."""
        words = words_of(text)
        ngrams, first_places = numpy.unique(hash_ngrams(words, self.n), return_index=True)
        found = []
        for name, known in self.sets.items():
            places = numpy.searchsorted(known, ngrams)
            shared = known[numpy.minimum(places, len(known) - 1)] == ngrams
            if shared.sum() >= self.threshold:
                start = first_places[shared].min()
                found.append(Overlap(name, int(shared.sum()), len(ngrams), " ".join(words[start : start + self.n])))
        return found


def decoded_pieces(path: str, tokenizer) -> Iterator[str]:
    """Yield the text of a token stream in pieces: its documents where they are known, and long ones in pieces that overlap."""
    tokens = read_tokens(path)
    ends = read_description(path)["document_ends"]
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        for first in range(start, end, TOKENS_PER_PIECE):
            piece = tokens[first : min(end, first + TOKENS_PER_PIECE + TOKENS_OF_OVERLAP)]
            yield tokenizer.decode(piece, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def index_evaluation_sets(evaluation_sets: dict[str, str], tokenizer, n: int, output: str) -> dict[str, int]:
    """Write the hashes of all n-grams of the evaluation sets, sorted within each set (Parquet: evaluation_set, ngram).

    Args:
        evaluation_sets: ``.bin`` file by name, its description beside it.
        tokenizer: that the files were made with; it turns them back into text.
        n: words of an n-gram.
        output: path of the Parquet file.

    Returns:
        Number of different n-grams by evaluation set.

    Raises:
        ValueError: if an evaluation set has fewer than n words in a row, so that nothing could be held against it.
    """
    counts = {}
    with pyarrow.parquet.ParquetWriter(output, SCHEMA.with_metadata({"n": str(n)})) as writer:
        for name, path in evaluation_sets.items():
            ngrams = [hash_ngrams(words_of(text), n) for text in decoded_pieces(path, tokenizer)]
            different = numpy.unique(numpy.concatenate(ngrams))
            if not len(different):
                raise ValueError(f"evaluation set {name!r} has no {n} words in a row: lower decontamination.ngram_words")
            counts[name] = len(different)
            columns = [pyarrow.array([name] * len(different)).dictionary_encode(), pyarrow.array(different)]
            writer.write_table(pyarrow.Table.from_arrays(columns, schema=writer.schema))
    return counts


def check_clean(texts: Iterator[tuple[str, str]], ngrams: EvaluationNgrams, what: str) -> None:
    """Make sure that no text that is to be trained on shares n-grams with an evaluation set: the last look at the result.

    Args:
        texts: (name, text) of each.
        what: is checked, for the message.

    Raises:
        ValueError: on the first that does.
    """
    for name, text in texts:
        for overlap in ngrams.overlaps(text):
            raise ValueError(
                f"{what}: {name} shares {overlap.shared_ngrams} {ngrams.n}-grams with the evaluation set "
                f"{overlap.evaluation_set!r}, such as “{overlap.example}”"
            )
