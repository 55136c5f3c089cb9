"""Copies of checkpoints at an address; in memory and in a folder, as fsspec has them."""

import shutil
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from longqlora.jobs.checkpoint_store import CheckpointStore, remove_checkpoints
from longqlora.jobs.checkpointing import (
    checkpoints,
    is_complete,
    newest_complete_checkpoint,
    open_checkpoint_folder,
    publish_checkpoint,
)

RUN = {"seed": 1}


@pytest.fixture(params=["memory", "file"])
def address(request, tmp_path):
    if request.param == "memory":
        yield "memory://store"
        fsspec.filesystem("memory").rm("/", recursive=True)
    else:
        yield (tmp_path / "store").as_uri()


@pytest.fixture
def machine(tmp_path):
    """A function that opens the checkpoint folder of a run on a machine, by the machine's name."""
    return lambda name, run=RUN: open_checkpoint_folder(str(tmp_path / name / "system"), run)


def save(folder: Path, step: int, content: str = "state") -> None:
    written = folder / "writing" / f"checkpoint-{step}"
    (written / "part").mkdir(parents=True)
    (written / "optimizer.pt").write_text(f"{content} {step}")
    (written / "part/zero.pt").write_text("a shard")
    publish_checkpoint(folder, written.name)


def save_and_copy(folder: Path, store: CheckpointStore, *steps: int) -> None:
    """Save checkpoints as a training does, which keeps the last two."""
    for step in steps:
        save(folder, step)
        for old in checkpoints(folder)[2:]:
            shutil.rmtree(old)
        store.update()


def test_another_machine_gets_the_newest_checkpoint(address, machine):
    first, other = machine("first"), machine("other")
    save_and_copy(first, CheckpointStore(address, first), 2, 4, 6)
    found = CheckpointStore(address, other).fetch_newer(newest_complete_checkpoint(other))
    assert found == other / "checkpoint-6"
    assert is_complete(found)
    assert (found / "optimizer.pt").read_text() == "state 6"
    assert (found / "part/zero.pt").read_text() == "a shard"
    assert not (other / "writing").exists()


def test_the_store_keeps_what_the_folder_keeps(address, machine):
    folder = machine("first")
    store = CheckpointStore(address, folder)
    save_and_copy(folder, store, 2, 4, 6)
    assert list(store.files()) == ["checkpoint-6", "checkpoint-4"]


def test_a_local_checkpoint_that_is_as_new_is_taken_and_an_older_one_is_not(address, machine):
    folder = machine("first")
    store = CheckpointStore(address, folder)
    save_and_copy(folder, store, 2, 4)
    assert store.fetch_newer(folder / "checkpoint-4") == folder / "checkpoint-4"
    shutil.rmtree(folder / "checkpoint-4")
    assert store.fetch_newer(folder / "checkpoint-2") == folder / "checkpoint-4"


def test_another_run_finds_nothing(address, machine):
    folder = machine("first")
    save_and_copy(folder, CheckpointStore(address, folder), 2)
    assert CheckpointStore(address, machine("other", {"seed": 2})).fetch_newer(None) is None


@pytest.mark.parametrize("damage", ["no manifest", "a file is missing", "a file is cut", "the manifest is cut"])
def test_a_damaged_or_incomplete_copy_is_removed_and_the_one_before_it_is_taken(address, machine, damage):
    first, other = machine("first"), machine("other")
    store = CheckpointStore(address, first)
    save_and_copy(first, store, 2, 4)
    newest = f"{store.folder}/checkpoint-4"
    if damage in ("no manifest", "a file is missing"):
        store.filesystem.rm_file(f"{newest}/{'files.json' if damage == 'no manifest' else 'optimizer.pt'}")
    else:
        name = "files.json" if "manifest" in damage else "optimizer.pt"
        store.filesystem.pipe_file(f"{newest}/{name}", store.filesystem.cat_file(f"{newest}/{name}")[:-1])
    assert CheckpointStore(address, other).fetch_newer(None) == other / "checkpoint-2"
    assert list(store.files()) == ["checkpoint-2"]


def test_the_manifest_comes_last(machine, monkeypatch):
    folder, put = machine("first"), []
    store = CheckpointStore("memory://store", folder)
    monkeypatch.setattr(MemoryFileSystem, "put_file", lambda self, local, target: put.append(Path(target).name))
    save_and_copy(folder, store, 2)
    assert len(put) == 3
    assert put[-1] == "files.json"


def test_a_store_that_is_away_for_a_moment_gets_what_it_missed(address, machine, monkeypatch, caplog):
    folder = machine("first")
    store = CheckpointStore(address, folder)
    with monkeypatch.context() as patch:
        patch.setattr(type(store.filesystem), "put_file", away)
        save_and_copy(folder, store, 2)
    assert f"could not be copied to {store.address} (ConnectionError: no route)" in caplog.text
    assert store.files() == {}
    save_and_copy(folder, store, 4)
    assert list(store.files()) == ["checkpoint-4", "checkpoint-2"]


def away(*_, **__):
    raise ConnectionError("no route")


def test_a_store_that_cannot_be_used_is_an_error_that_names_it(machine, monkeypatch, tmp_path):
    with pytest.raises(OSError, match=r"training\.checkpoint_store: nowhere://a/system-\w+ cannot be used \(ValueError: "):
        CheckpointStore("nowhere://a", machine("first"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"training\.checkpoint_store: file://.*/file/system-\w+ cannot be used"):
        CheckpointStore((tmp_path / "file").as_uri(), machine("first"))
    store = CheckpointStore("memory://store", machine("first"))
    monkeypatch.setattr(MemoryFileSystem, "find", away)
    with pytest.raises(OSError, match=r"memory://store/system-\w+ cannot be used \(ConnectionError: no route\)"):
        store.fetch_newer(None)


def test_a_training_that_has_ended_leaves_no_checkpoints(address, machine, monkeypatch, caplog):
    folder = machine("first")
    store = CheckpointStore(address, folder)
    save_and_copy(folder, store, 2)
    with monkeypatch.context() as patch:
        patch.setattr(type(store.filesystem), "rm", away)
        remove_checkpoints(folder, address)  # the training is over, and its result is not lost
    assert "could not be removed" in caplog.text
    remove_checkpoints(machine("first"), address)
    assert not folder.exists()
    assert not store.filesystem.exists(store.folder)
