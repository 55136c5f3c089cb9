"""One pass over the files of a source, which accounts for every record: usable, malformed, or contaminated.

The corpus and the instruction set both read their sources in this way. Their data cards list every file with its digest and its
counts, and the first malformed records. Records that share passages with an evaluation set are listed in the report on removed
records.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from hashlib import sha256
from typing import TypeVar

from longqlora.data.decontamination import EvaluationNgrams, Overlap
from longqlora.data.file_formats import file_format
from longqlora.data.readers import Malformed
from longqlora.data.sampling import priority, text_id

log = logging.getLogger(__name__)

MAX_EXAMPLES = 20  # of malformed records, in the data card
OVERLAP_COLUMNS = [field.name for field in fields(Overlap)]  # of the report on removed records

Record = TypeVar("Record")


class RecordCounter:
    """Numbers of usable and malformed records, and the first malformed ones as examples."""

    def __init__(self) -> None:
        self.usable, self.malformed = 0, 0
        self.examples: list[str] = []

    def add_malformed(self, malformed: Malformed) -> None:
        """Count a malformed record.

        Raises:
            ValueError: see :meth:`check_format`; checked from the 100th malformed record on.
        """
        self.malformed += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(str(malformed))
        if self.malformed >= 100:
            self.check_format()

    def check_format(self) -> None:
        """Check that most records are usable, so that files in another format than expected are noticed early.

        Raises:
            ValueError: if there are more malformed than usable records.
        """
        if self.malformed > self.usable:
            raise ValueError(
                f"{self.malformed} of {self.usable + self.malformed} records are malformed: do the files have another format, "
                f"or another schema, or is the text in a field other than text_field? The first: {self.examples[0]}"
            )


def check_malformed_share(malformed: int, usable: int, examples: list[str], max_share: float) -> None:
    """Check that the share of malformed records is tolerable.

    Args:
        malformed, usable: numbers of records.
        examples: of malformed records, for the message.
        max_share: the largest share of malformed records that is tolerated.

    Raises:
        ValueError: if the share is larger; the message shows the first malformed records.
    """
    share = malformed / max(1, malformed + usable)
    if share > max_share:
        shown = "\n".join(f"  {example}" for example in examples[:5])
        raise ValueError(
            f"{malformed} of {malformed + usable} records are malformed ({share:.2%}), max_malformed_share allows "
            f"{max_share:.2%}:\n{shown}"
        )


@dataclass(frozen=True)
class FileCounts:
    """A file that was read: its path, the SHA-256 of its bytes, and its numbers of usable and malformed records."""

    path: str
    sha256: str
    usable: int
    malformed: int


class SourcePass:
    """One pass over the files of a source.

    Args:
        seed: of the records' priorities.
        ngrams: of the evaluation sets.
    """

    def __init__(self, seed: int, ngrams: EvaluationNgrams):
        self.seed, self.ngrams = seed, ngrams
        self.counter = RecordCounter()
        self.files: list[FileCounts] = []

    def read_files(self, paths: Iterable[str], read: Callable[..., Iterator[Record]]) -> Iterator[Record]:
        """Yield the usable records of all files, and note the digest and the counts of each file.

        Args:
            paths: of the files.
            read: reads one file; called with its path and the keywords ``on_malformed`` and ``digest``, see
                :func:`longqlora.data.readers.read_records`.

        Raises:
            ValueError: if a file is damaged or of an unknown format, or more records are malformed than usable.
        """
        counter, paths = self.counter, list(paths)
        for path in paths:
            file_format(path)  # before hours of reading the others
        for path in paths:
            digest, usable, malformed = sha256(), counter.usable, counter.malformed
            for record in read(path, on_malformed=counter.add_malformed, digest=digest):
                counter.usable += 1
                yield record
            counts = FileCounts(path, digest.hexdigest(), counter.usable - usable, counter.malformed - malformed)
            self.files.append(counts)
            log.info("%s: %d usable and %d malformed records", path, counts.usable, counts.malformed)
        counter.check_format()

    def identify(self, text: str) -> tuple[int, str]:
        """Priority of a record in the sample, and its id, from its text."""
        record_id = text_id(text)
        return priority(record_id, self.seed), record_id

    def overlap_rows(self, text: str, origin: dict) -> list[dict]:
        """Rows of the report on removed records, one per evaluation set that a text overlaps; empty for a clean text.

        Args:
            text: of the record.
            origin: further columns, which say where the record is from.
        """
        return [{**origin, **vars(overlap)} for overlap in self.ngrams.overlaps(text)]
