"""Digests of values and files: results are stamped with them, and files count for a rerun by their contents.

Snakemake compares an input by its contents up to 1 MB and by its date beyond; a folder by its own date alone. Data and models
that a user keeps are larger, so rules have a digest of their contents as a param. A digest is kept by the file's size and date,
so that a large file is read once and planning stays fast.

Standard library only: the workflow imports it on every start.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

log = logging.getLogger(__name__)

STORE = Path(".snakemake/longqlora/files.json")
READERS = 4  # files read at once
LARGE = 2**30  # bytes from which on the reading is announced
SHOWN = 3  # files that a fingerprint names


def digest_of_values(values: object) -> str:
    """SHA-256 of anything that JSON can hold, first 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def digest_of_file(path: str | Path) -> str:
    """SHA-256 of a file of any size, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamp(params) -> dict[str, str]:
    """Digests that a record is stamped with, from the params of its job: of the code (the params without a name, see
    :mod:`longqlora.jobs.code`) and of all that is configured (those with one)."""
    configured = dict(params.items())
    code = list(params)[: len(params) - len(configured)]
    return {"code_digest": digest_of_values(code), "config_digest": digest_of_values(configured)}


class FileFacts:
    """Facts about files that take a while to find, kept on disk as long as a file has the same size and date.

    Args:
        store: JSON file that keeps them; one that is missing, damaged or not writable costs only time.
    """

    def __init__(self, store: Path = STORE):
        self.store = store
        try:
            self.known = json.loads(store.read_text())
        except (OSError, ValueError):
            self.known = {}

    def find(self, fact: str, paths: Sequence[str | Path], compute: Callable) -> list:
        """A fact of each file, computed where it is not known.

        Args:
            fact: its name.
            paths: files that exist.
            compute: path → the fact, as JSON can hold it.
        """
        known = self.known.setdefault(fact, {})
        states = {os.path.abspath(path): size_and_date(path) for path in paths}
        missing = [path for path, state in states.items() if known.get(path, [None])[0] != state]
        if missing:
            size = sum(states[path][0] for path in missing)
            if size >= LARGE:
                log.warning("reading %.1f GB in %d files once, to notice when they change", size / 1e9, len(missing))
            with ThreadPoolExecutor(READERS) as pool:
                found = pool.map(compute, map(Path, missing))
                known |= {path: [states[path], value] for path, value in zip(missing, found, strict=True)}
            self.write()
        return [known[os.path.abspath(path)][1] for path in paths]

    def write(self) -> None:
        """Keep what is known; of several processes that do so at once the last one's is kept."""
        try:
            self.store.parent.mkdir(parents=True, exist_ok=True)
            new = self.store.with_suffix(f".{os.getpid()}")
            new.write_text(json.dumps(self.known))
            new.replace(self.store)
        except OSError as error:
            log.warning("%s cannot be written (%s): files are read again on the next start", self.store, error)

    def fingerprint(self, paths: Iterable[str | Path]) -> str:
        """Names and contents of files in one line: a rule names it as a param, so that Snakemake's reason names the files.

        Args:
            paths: files that exist.
        """
        names = list(map(str, paths))
        digests = self.find("sha256", names, digest_of_file)
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        return f"{', '.join(names[:SHOWN])}{more} {digest_of_values(list(zip(names, digests, strict=True)))}"


def size_and_date(path: str | Path) -> list[int]:
    """Size in bytes and date of the last change in nanoseconds; another size or date may mean other contents."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]
