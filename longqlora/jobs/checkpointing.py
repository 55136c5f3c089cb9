"""Crash-safe checkpoints: complete or ignored.

A checkpoint is written under another name, gets a manifest (its files with their digests), and is then renamed. A run that is
killed at any moment therefore leaves complete checkpoints and at most one that is incomplete, which is ignored.
"""

import json
import logging
import os
import shutil
from pathlib import Path

from longqlora.jobs.digests import digest_of_file, digest_of_values

log = logging.getLogger(__name__)

MANIFEST = "files.json"
WRITING = "writing"  # folder of the checkpoint that is being written


def write_manifest(folder: Path) -> None:
    """List the files of a checkpoint with their digests, all of it on the disk before the list is."""
    digests = {path.relative_to(folder).as_posix(): digest_of_file(path) for path in folder.rglob("*") if path.is_file()}
    for name in digests:
        flush_to_disk(folder / name)
    (folder / MANIFEST).write_text(json.dumps(digests))
    flush_to_disk(folder / MANIFEST)


def flush_to_disk(path: Path) -> None:
    """Wait until a file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_complete(folder: Path) -> bool:
    """Whether every file of a checkpoint is as its manifest says."""
    try:
        digests = json.loads((folder / MANIFEST).read_text())
        return all(digest_of_file(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError):
        return False


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rsplit("-", 1)[1]))


def newest_complete_checkpoint(folder: Path) -> Path | None:
    """The checkpoint to resume from; newer ones that are damaged are removed, and so is what was being written."""
    shutil.rmtree(folder / WRITING, ignore_errors=True)
    for checkpoint in checkpoints(folder):
        if is_complete(checkpoint):
            return checkpoint
        log.warning("%s is damaged and is not used", checkpoint)
        shutil.rmtree(checkpoint)
    return None


def publish_checkpoint(folder: Path, name: str) -> None:
    """Move a checkpoint that has been written to its place, with its manifest."""
    write_manifest(folder / WRITING / name)
    (folder / WRITING / name).rename(folder / name)


def open_checkpoint_folder(path: str, identity: dict) -> Path:
    """The folder for a run's checkpoints; those of a run with other settings, data or base model are removed.

    Args:
        path: of the folder.
        identity: what the run's result depends on, as JSON.
    """
    folder, digest = Path(path), digest_of_values(identity)
    mark = folder / "run.txt"
    if folder.exists() and not (mark.exists() and mark.read_text() == digest):
        log.info("%s is of a run with other settings or data: the training begins anew", folder)
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(digest)
    return folder
