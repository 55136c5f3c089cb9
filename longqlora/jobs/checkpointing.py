"""Atomic, verified checkpoints.

A checkpoint is written to a temporary folder, gets a manifest (its files with their digests) and is then renamed. A run that is
killed at any moment therefore leaves complete checkpoints, and at most one incomplete checkpoint, which is ignored.
"""

import json
import logging
import os
import shutil
from pathlib import Path

from longqlora.jobs.digests import digest_of_file, digest_of_values

log = logging.getLogger(__name__)

MANIFEST = "files.json"
RUN = "run.txt"  # the digest of the run that a folder of checkpoints belongs to
WRITING = "writing"  # temporary folder of the checkpoint that is being written


def write_manifest(folder: Path) -> None:
    """Write the manifest of a checkpoint, after all of its files have been flushed to the disk."""
    digests = {path.relative_to(folder).as_posix(): digest_of_file(path) for path in folder.rglob("*") if path.is_file()}
    for name in digests:
        flush_to_disk(folder / name)
    (folder / MANIFEST).write_text(json.dumps(digests), encoding="utf-8")
    flush_to_disk(folder / MANIFEST)


def flush_to_disk(path: Path) -> None:
    """Wait until a file has been written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint has a manifest and every file in it has the digest that the manifest lists."""
    try:
        digests = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return all(digest_of_file(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError):
        return False


def step_of_checkpoint(name: str) -> int:
    """The step that a checkpoint has in its name."""
    return int(name.rsplit("-", 1)[1])


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: step_of_checkpoint(path.name), reverse=True)


def newest_complete_checkpoint(folder: Path) -> Path | None:
    """The checkpoint to resume from, if any. Newer damaged checkpoints and a partly written one are removed."""
    shutil.rmtree(folder / WRITING, ignore_errors=True)
    for checkpoint in checkpoints(folder):
        if is_complete(checkpoint):
            return checkpoint
        log.warning("%s is damaged and is not used", checkpoint)
        shutil.rmtree(checkpoint)
    return None


def publish_checkpoint(folder: Path, name: str) -> None:
    """Write the manifest of a finished checkpoint and move it out of the temporary folder."""
    write_manifest(folder / WRITING / name)
    (folder / WRITING / name).rename(folder / name)


def open_checkpoint_folder(path: str, run: dict) -> Path:
    """The folder for a run's checkpoints. Checkpoints of a run with other settings, data or base model are removed.

    Args:
        path: of the folder.
        run: everything that the result of the run depends on, as JSON values.
    """
    folder, digest = Path(path), digest_of_values(run)
    digest_file = folder / RUN
    if folder.exists() and not (digest_file.exists() and digest_file.read_text(encoding="utf-8") == digest):
        log.info("%s has checkpoints of a run with other settings or data: the training starts again", folder)
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    digest_file.write_text(digest, encoding="utf-8")
    return folder
