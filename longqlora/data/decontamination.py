"""Decontamination: training texts that share word n-grams with an evaluation set are removed.

After Brown et al. 2020 (arXiv 2005.14165, appendix C), who look for 13-grams. Words are compared without case, accents,
punctuation, markup of emphasis and hyphens, so a copy is found whatever its layout and Unicode form; see :func:`words_of`.

N-grams are compared by 64-bit hashes. With 10⁷ n-grams in evaluation sets and 10¹⁰ in training texts, the probability that two
different n-grams have the same hash is 0.5 %; this would remove one clean text.
"""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

import numpy
import pandas
import pyarrow
import pyarrow.parquet

WORD = re.compile(r"\w+")
UNSEEN = ("Mn", "Mc", "Me", "Cf")  # Unicode categories: combining marks, and format characters such as the zero-width joiner
SOFT_HYPHEN = re.compile(r"\xad\s*")
HYPHEN = re.compile(r"[-\u2010](?<=[^\W\d_].)\s*(?=[^\W\d_])")  # with a letter before it and a letter after it
EMPHASIS = re.compile(r"_(?:(?<!\w_)_*+|(?<!__)_*+(?!\w))")  # underscores at the edge of a word; those inside are a name's
MULTIPLIER = numpy.uint64(0x9E3779B97F4A7C15)  # odd, its bits well mixed (2⁶⁴ / golden ratio)
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
        example: words of the first shared n-gram.
    """

    evaluation_set: str
    shared_ngrams: int
    num_ngrams: int
    example: str


def words_of(text: str) -> list[str]:
    """The words of a text, in a form that equal words have in every copy of it.

    A word is a run of letters, digits and underscores. Case, combining marks (accents), and differences of Unicode's
    compatibility form (NFKD) do not count: ``Été`` is ``ete``, and the ligature ``ﬁ`` is ``fi``. Soft hyphens, zero-width
    characters, and underscores around a word are left out. A hyphen between letters joins them, also at the end of a line,
    because nothing tells a hyphenated line end from a compound that was broken there: ``well-known`` is ``wellknown``.
    """
    text = unicodedata.normalize("NFKD", text)
    if not text.isascii():
        text = SOFT_HYPHEN.sub("", text)
        for character in set(text):  # some hundred at most, and replacing one takes a hundredth of what a regex would
            if unicodedata.category(character) in UNSEEN:
                text = text.replace(character, "")
    return WORD.findall(HYPHEN.sub("", EMPHASIS.sub("", text.casefold())))


def hash_ngrams(words: list[str], n: int) -> numpy.ndarray:
    """Hashes of the n-grams of consecutive words, as uint64 ``[max(0, len(words) - n + 1)]``.

    The hash of an n-gram is a polynomial in the hashes of its words, modulo 2⁶⁴.
    """
    hashes = pandas.util.hash_array(numpy.array(words, dtype=object), categorize=False)  # [words], the same on every machine
    ngrams = numpy.zeros(max(0, len(words) - n + 1), dtype=numpy.uint64)
    for offset in range(n if len(ngrams) else 0):
        ngrams = ngrams * MULTIPLIER + hashes[offset : offset + len(ngrams)]
    return ngrams


class EvaluationNgrams:
    """The n-grams of an experiment's evaluation sets, which training texts are compared with.

    Args:
        path: file that :func:`index_evaluation_sets` wrote.
        threshold: a text that shares this number of different n-grams with an evaluation set is contaminated.
    """

    def __init__(self, path: str, threshold: int):
        table = pyarrow.parquet.read_table(path)
        self.n, self.threshold = int(table.schema.metadata[b"n"]), threshold
        names, ngrams = table.column("evaluation_set").to_numpy(), table.column("ngram").to_numpy()
        self.sets = {name: ngrams[names == name] for name in dict.fromkeys(names)}  # each sorted

    def overlaps(self, text: str) -> list[Overlap]:
        """The evaluation sets with which a text shares ``threshold`` n-grams or more."""
        words = words_of(text)
        ngrams, first_positions = numpy.unique(hash_ngrams(words, self.n), return_index=True)
        found = []
        for name, known in self.sets.items():
            positions = numpy.searchsorted(known, ngrams)
            shared = known[numpy.minimum(positions, len(known) - 1)] == ngrams
            if shared.sum() >= self.threshold:
                start = first_positions[shared].min()
                found.append(Overlap(name, int(shared.sum()), len(ngrams), " ".join(words[start : start + self.n])))
        return found


def index_evaluation_sets(evaluation_sets: dict[str, Iterable[str]], n: int, output: str) -> dict[str, int]:
    """Write the hashes of all n-grams of the evaluation sets (Parquet: evaluation_set, ngram), sorted within each set.

    Args:
        evaluation_sets: texts of each set, by name.
        n: number of words in an n-gram.
        output: path of the Parquet file.

    Returns:
        Number of different n-grams by evaluation set.

    Raises:
        ValueError: if no document of an evaluation set has n words, so that no text could be found to overlap it.
    """
    counts = {}
    with pyarrow.parquet.ParquetWriter(output, SCHEMA.with_metadata({"n": str(n)})) as writer:
        for name, texts in evaluation_sets.items():
            ngrams = [hash_ngrams(words_of(text), n) for text in texts]
            different = numpy.unique(numpy.concatenate(ngrams))
            if not len(different):
                raise ValueError(f"evaluation set {name!r} has no {n} words in a row: lower decontamination.ngram_words")
            counts[name] = len(different)
            columns = [pyarrow.array([name] * len(different)).dictionary_encode(), pyarrow.array(different)]
            writer.write_table(pyarrow.Table.from_arrays(columns, schema=writer.schema))
    return counts


def check_clean(texts: Iterable[tuple[str, str]], ngrams: EvaluationNgrams, description: str) -> None:
    """Check finished training data: no text may overlap an evaluation set.

    Args:
        texts: (id, text) of each.
        ngrams: of the evaluation sets.
        description: of the data, for the message.

    Raises:
        ValueError: on the first text that overlaps an evaluation set.
    """
    for name, text in texts:
        for overlap in ngrams.overlaps(text):
            raise ValueError(
                f"{description}: {name} shares {overlap.shared_ngrams} {ngrams.n}-grams with the evaluation set "
                f"{overlap.evaluation_set!r}, such as “{overlap.example}”"
            )
