"""Copies of a training's checkpoints at an address that fsspec opens, such as ``s3://bucket/folder``.

If the machine of a training is lost with its disk, another machine resumes from the copy. The store of a run holds the same
checkpoints as its local folder, in a folder that has the digest of the run in its name
(:func:`longqlora.jobs.checkpointing.open_checkpoint_folder`), so that no other run finds them. The manifest of a checkpoint is
copied last, and all files are compared with it after a download.
"""

import logging
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import fsspec

from longqlora.jobs.checkpointing import MANIFEST, RUN, WRITING, checkpoints, is_complete, step_of_checkpoint

log = logging.getLogger(__name__)

KEY = "training.checkpoint_store"
CHECKPOINT = re.compile(r"checkpoint-\d+")


class CheckpointStore:
    """The store of one run. Only one process of a training may have it.

    Args:
        address: that the stores of all runs share.
        checkpoint_dir: the run's local folder, see :func:`longqlora.jobs.checkpointing.open_checkpoint_folder`.

    Raises:
        OSError: if a file cannot be written to the address.
    """

    def __init__(self, address: str, checkpoint_dir: Path):
        run = (checkpoint_dir / RUN).read_text(encoding="utf-8")
        self.checkpoint_dir, self.address = checkpoint_dir, f"{address.rstrip('/')}/{checkpoint_dir.name}-{run}"
        with explained(self.address):
            self.filesystem, self.folder = fsspec.url_to_fs(self.address)
            self.put(checkpoint_dir / RUN, RUN)

    def put(self, path: Path, name: str) -> None:
        """Copy a file to a name in the store."""
        target = f"{self.folder}/{name}"
        make_folder(self.filesystem, target.rsplit("/", 1)[0])
        self.filesystem.put_file(str(path), target)

    def files(self) -> dict[str, list[str]]:
        """The files of each checkpoint in the store, of incomplete ones too, the newest checkpoint first."""
        self.filesystem.invalidate_cache()
        found = defaultdict(list)
        for path in self.filesystem.find(self.folder):
            checkpoint, _, name = path.removeprefix(f"{self.folder}/").partition("/")
            if name and CHECKPOINT.fullmatch(checkpoint):
                found[checkpoint].append(name)
        return {name: found[name] for name in sorted(found, key=step_of_checkpoint, reverse=True)}

    def fetch_newer(self, local: Path | None) -> Path | None:
        """Download the newest complete checkpoint, if it is of a later step than the local one. Damaged and incomplete ones are
        removed.

        Args:
            local: the newest complete checkpoint of the local folder, if any.

        Returns:
            The checkpoint to resume from, if any.

        Raises:
            OSError: if the store cannot be read, or the checkpoint not be written.
        """
        with explained(self.address):
            for name, files in self.files().items():
                if local and step_of_checkpoint(name) <= step_of_checkpoint(local.name):
                    break
                if MANIFEST in files and self.download(name, files):
                    return self.checkpoint_dir / name
                log.warning("%s/%s is incomplete or damaged and is not used", self.address, name)
                self.remove(name)
        return local

    def download(self, name: str, files: list[str]) -> bool:
        """Download a checkpoint into the local folder; whether its files are those of its manifest."""
        log.info("downloading %s/%s", self.address, name)
        temporary = self.checkpoint_dir / WRITING / name
        for file in files:
            (temporary / file).parent.mkdir(parents=True, exist_ok=True)
            self.filesystem.get_file(f"{self.folder}/{name}/{file}", str(temporary / file))
        complete = is_complete(temporary)
        if complete:
            temporary.rename(self.checkpoint_dir / name)
        shutil.rmtree(self.checkpoint_dir / WRITING)
        return complete

    def update(self) -> None:
        """Copy the local checkpoints that the store lacks, the newest first, and remove those that are no longer local. Where
        that fails, it is logged, and the next call makes up for it."""
        started = time.perf_counter()
        try:
            stored, local = self.files(), checkpoints(self.checkpoint_dir)
            for checkpoint in local:
                if MANIFEST not in stored.get(checkpoint.name, []):
                    self.upload(checkpoint)
            for name in stored.keys() - {checkpoint.name for checkpoint in local}:
                self.remove(name)
        except Exception as error:  # each file system of fsspec has its own errors
            log.warning(
                "the checkpoints could not be copied to %s (%s: %s); the training goes on, and tries again with the next one",
                self.address,
                type(error).__name__,
                error,
            )
        else:
            log.info("checkpoints copied to %s in %.1f s", self.address, time.perf_counter() - started)

    def upload(self, checkpoint: Path) -> None:
        """Copy a checkpoint to the store, its manifest last."""
        files = [path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()]
        for file in sorted(files, key=lambda file: file == MANIFEST):
            self.put(checkpoint / file, f"{checkpoint.name}/{file}")

    def remove(self, name: str) -> None:
        """Remove a checkpoint from the store, its manifest first."""
        folder = f"{self.folder}/{name}"
        if self.filesystem.exists(f"{folder}/{MANIFEST}"):
            self.filesystem.rm_file(f"{folder}/{MANIFEST}")
        self.filesystem.rm(folder, recursive=True)


@contextmanager
def explained(address: str) -> Iterator[None]:
    """Name the key and the address in errors of their file system.

    Raises:
        OSError: in place of any other error.
    """
    try:
        yield
    except Exception as error:  # each file system of fsspec has its own errors
        raise OSError(f"{KEY}: {address} cannot be used ({type(error).__name__}: {error})") from error


def make_folder(filesystem, folder: str) -> None:
    """Make a folder where files need one. Object stores have none, and s3fs would create a bucket for a misspelled address."""
    if not filesystem.async_impl:
        filesystem.makedirs(folder, exist_ok=True)


def write_and_remove(address: str) -> None:
    """Write a small file to the address that the stores of all runs share, and remove it.

    Raises:
        Exception: of its file system, if that is not possible.
    """
    filesystem, folder = fsspec.url_to_fs(address)
    make_folder(filesystem, folder)
    path = f"{folder}/writable-{uuid4().hex}.txt"  # of this process alone
    filesystem.pipe_file(path, b"This file may be removed.")
    filesystem.rm_file(path)


def remove_checkpoints(checkpoint_dir: Path, address: str | None) -> None:
    """Remove the checkpoints of a training that has ended, those in its store too.

    Args:
        checkpoint_dir: the run's local folder.
        address: of the store, if there is one.
    """
    if address:
        try:
            store = CheckpointStore(address, checkpoint_dir)
            with explained(store.address):
                store.filesystem.rm(store.folder, recursive=True)
        except OSError as error:
            log.warning("the checkpoints of the training, which has ended, could not be removed: %s", error)
    shutil.rmtree(checkpoint_dir)
