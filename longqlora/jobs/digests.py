"""Digests of values and files, for the records and for reruns that depend on the contents of files.

Snakemake compares an input file by its contents up to 1 MB and by its date beyond that, and a folder by its own date only. The
user's data and models are larger, so rules have a digest of their contents as a param. Digests are stored with the file's size
and date: a large file is read once, and planning stays fast.

This module uses the standard library only: Snakemake imports it at every start.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

STORE = Path(".snakemake/longqlora/files.json")
READERS = 4  # files read at once
LARGE = 2**30  # bytes to read from which on a message says so
SHOWN = 3  # files that a fingerprint names at most


def digest_of_values(values: object) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a value that JSON can represent."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def digest_of_file(path: str | Path) -> str:
    """SHA-256 of a file of any size, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamp(params: Any) -> dict[str, str]:
    """Digests of a job's code and configuration, for its record.

    Args:
        params: ``snakemake.params``. Those without a name are digests of code (:mod:`longqlora.jobs.code`), those with a name
            are configured values.
    """
    configured = dict(params.items())
    code = list(params)[: len(params) - len(configured)]
    return {"code_digest": digest_of_values(code), "config_digest": digest_of_values(configured)}


class FileFacts:
    """Facts about files that are slow to compute, stored on disk until a file's size or date changes.

    Args:
        store: JSON file with the facts. If it is missing, damaged or not writable, facts are computed again.
    """

    def __init__(self, store: Path = STORE):
        self.store = store
        try:
            self.known = json.loads(store.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.known = {}

    def find(self, fact: str, paths: Sequence[str | Path], compute: Callable[[Path], Any]) -> list[Any]:
        """One fact about each file; facts that are not stored are computed.

        Args:
            fact: name of the fact.
            paths: existing files.
            compute: returns the fact about a path, as a value that JSON can represent.
        """
        known = self.known.setdefault(fact, {})
        states = {os.path.abspath(path): size_and_date(path) for path in paths}
        missing = [path for path, state in states.items() if known.get(path, [None])[0] != state]
        if missing:
            size = sum(states[path][0] for path in missing)
            if size >= LARGE:
                log.warning("reading %.1f GB in %d files once, so that later changes are noticed", size / 1e9, len(missing))
            with ThreadPoolExecutor(READERS) as pool:
                found = pool.map(compute, map(Path, missing))
                known |= {path: [states[path], value] for path, value in zip(missing, found, strict=True)}
            self.write()
        return [known[os.path.abspath(path)][1] for path in paths]

    def write(self) -> None:
        """Store all facts. If several processes do so at the same time, the facts of the last one remain."""
        try:
            self.store.parent.mkdir(parents=True, exist_ok=True)
            new = self.store.with_suffix(f".{os.getpid()}")
            new.write_text(json.dumps(self.known), encoding="utf-8")
            new.replace(self.store)
        except OSError as error:
            log.warning("cannot write %s (%s): the next start reads the files again", self.store, error)

    def fingerprint(self, paths: Iterable[str | Path]) -> str:
        """The names of the first files and a digest of all names and contents, in one line. As a param of a rule it makes
        Snakemake's reason name the files.

        Args:
            paths: existing files.
        """
        names = list(map(str, paths))
        digests = self.find("sha256", names, digest_of_file)
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        return f"{', '.join(names[:SHOWN])}{more} {digest_of_values(list(zip(names, digests, strict=True)))}"


def size_and_date(path: str | Path) -> list[int]:
    """Size in bytes and modification time in nanoseconds; if neither has changed, the contents are taken to be the same."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]
