"""Reserve GPUs: each job of a machine takes as many free GPUs as it asks for, waits while they are busy, and sees no others.

Snakemake counts GPUs but does not say which one a job may use, and transformers trains on all GPUs that it sees.

Each GPU has a lock file in a folder that all users of the machine share. The operating system drops a lock when the processes
that hold it are gone, after SIGKILL too.

- A job takes a GPU by an exclusive lock, which fails while anybody else has a lock on it, and then keeps a shared lock.
- The processes that the job starts with torchrun take the same shared lock (:func:`share_reservation`), so that a GPU stays
  reserved while one of them lives on without the job.
- Only one job at a time looks for free GPUs, the one that has locked the folder. So nobody can come between while it turns
  an exclusive lock into a shared one, and no job sees GPUs as busy that another tries and gives back.

Standard library only, and nothing here starts CUDA, which reads CUDA_VISIBLE_DEVICES once, when it starts.
"""

import ctypes
import fcntl
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TextIO

# Not tempfile's folder: users and clusters set TMPDIR, to a folder per job or on a network file system.
LOCK_FOLDER = Path("/tmp/longqlora-gpus")
VISIBLE = "CUDA_VISIBLE_DEVICES"
HELD_LOCKS = "LONGQLORA_GPU_LOCKS"  # JSON: path of each lock file that this job holds, and what the job wrote into it
SECONDS_BETWEEN_MESSAGES = 600


def list_gpus() -> list[str]:
    """Names of this machine's GPUs in the order of their indices: UUIDs where nvidia-smi knows them, else the indices.

    A cluster may show a job only the GPUs that it has allotted to it. Two such jobs know different GPUs by the same index, so
    that locks need UUIDs.
    """
    return uuids_by_nvidia_smi() or indices_by_torch()


def uuids_by_nvidia_smi() -> list[str]:
    """UUIDs of the GPUs; none where the program is missing or fails."""
    command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        return []
    return [line.strip() for line in lines if line.startswith("GPU-")]


def indices_by_torch() -> list[str]:
    """Indices of the GPUs, counted by torch in a process of its own: where torch finds no NVML, counting starts CUDA."""
    environment = {name: value for name, value in os.environ.items() if name != VISIBLE}
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    count = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [str(index) for index in range(int(count))]


@contextmanager
def reserve_gpus(
    device: str,
    count: int,
    *,
    driver: Callable[[], list[str]] = list_gpus,
    folder: Path = LOCK_FOLDER,
    poll_seconds: float = 1.0,
) -> Iterator[None]:
    """Reserve ``count`` free GPUs, waiting while they are busy, and let CUDA see only these until the context ends.

    Enter it before anything starts CUDA; importing bitsandbytes does, and with it peft. Indices in CUDA_VISIBLE_DEVICES are
    read in nvidia-smi's order, which on a machine with different GPUs is CUDA's only under CUDA_DEVICE_ORDER=PCI_BUS_ID.

    Args:
        device: ``cuda``, or ``cpu``, for which nothing is reserved.
        count: GPUs that the job needs, 1 or more.
        driver: lists the machine's GPUs as :func:`list_gpus` does.
        folder: holds the lock files; on a local file system.
        poll_seconds: between two looks for free GPUs.

    Raises:
        ValueError: if the machine, or CUDA_VISIBLE_DEVICES, has fewer GPUs than asked for.
        RuntimeError: if CUDA has already started in this process and sees more GPUs than asked for, or if this process or the
            job that started it has reserved GPUs already.
    """
    if device == "cpu":
        yield
        return
    if HELD_LOCKS in os.environ:
        raise RuntimeError("GPUs are already reserved for this process; it would wait for itself")
    visible = os.environ.get(VISIBLE)
    machine = driver()
    gpus = visible_gpus(machine, visible)
    if len(gpus) < count:
        raise ValueError(too_few_gpus(count, gpus, machine, visible))
    if len(gpus) > count and cuda_has_started():
        raise RuntimeError(f"CUDA started before GPUs were reserved: this process would see {len(gpus)}, not {count}")
    holder = f"process {os.getpid()} since {datetime.now().isoformat()}"  # for a person to read, and no two jobs have the same
    locks = wait_for_gpus(gpus, count, folder, holder, poll_seconds)
    settings = {VISIBLE: ",".join(locks), HELD_LOCKS: json.dumps({lock.name: holder for lock in locks.values()})}
    if visible is None:
        settings["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # the order in which nvidia-smi lists GPUs
    logging.info("reserved %s=%s", VISIBLE, settings[VISIBLE])
    try:
        with environment(settings):
            yield
    finally:
        release(locks)


def share_reservation() -> None:
    """Keep the GPUs of the job that started this process reserved as long as this process lives; without any, do nothing.

    Raises:
        RuntimeError: if that job has ended, so that another may have its GPUs by now.
    """
    for path, holder in json.loads(os.environ.get(HELD_LOCKS, "{}")).items():
        try:
            lock = os.open(path, os.O_RDONLY)  # never closed: the lock lasts as long as the process
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            is_ours = os.read(lock, 1000).decode() == holder  # else another job has taken the GPU
        except (BlockingIOError, FileNotFoundError):
            is_ours = False
        if not is_ours:
            raise RuntimeError(f"the job that reserved a GPU for this process ({holder}) no longer holds {path}")


def visible_gpus(machine: list[str], visible: str | None) -> dict[str, str]:
    """The GPUs that CUDA shows, in its order: the entry in CUDA_VISIBLE_DEVICES, and the name by which the GPU is locked.

    Args:
        machine: names of all GPUs.
        visible: value of CUDA_VISIBLE_DEVICES, None where it is not set.
    """
    if visible is None:
        return {str(index): name for index, name in enumerate(machine)}
    found = {}
    for entry in map(str.strip, visible.split(",")):
        name = gpu_name(entry, machine)
        if name is None:
            break  # CUDA ignores what follows an invalid entry
        if name in found.values():
            return {}  # CUDA shows no GPU at all when one is listed twice
        found[entry] = name
    return found


def gpu_name(entry: str, machine: list[str]) -> str | None:
    """Name of the GPU that an entry of CUDA_VISIBLE_DEVICES means: an index, the beginning of a UUID, or a part of a GPU (MIG),
    which is locked by itself; None where there is none."""
    if not machine:
        return None
    if re.fullmatch("[0-9]+", entry):
        return machine[int(entry)] if int(entry) < len(machine) else None
    if entry.startswith("MIG-"):
        return entry
    if not entry.startswith("GPU-"):
        return None
    if not machine[0].startswith("GPU-"):
        return entry  # the machine's UUIDs are unknown
    matches = [name for name in machine if name.startswith(entry)]
    return matches[0] if len(matches) == 1 else None


def too_few_gpus(count: int, gpus: dict[str, str], machine: list[str], visible: str | None) -> str:
    """Error message: what was asked for, what there is and why, and what to change."""
    if not machine:
        return "device: cuda is configured, but nvidia-smi and torch see no GPU on this machine; 'cpu' would run without one"
    if not gpus:
        return f"device: cuda is configured, but {VISIBLE}={visible!r} allows no GPU; 'cpu' would run without one"
    limit = "this machine has" if visible is None else f"{VISIBLE}={visible!r} allows"
    settings = "training.num_processes or evaluation.num_processes"
    return f"{count} GPUs are asked for, but {limit} {len(gpus)}; lower {settings}, or set device: cpu to run without a GPU"


def cuda_has_started() -> bool:
    """Whether anything in this process has started CUDA, even only to ask whether there is a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) == 0  # before the start it answers with an error


def wait_for_gpus(gpus: dict[str, str], count: int, folder: Path, holder: str, poll_seconds: float) -> dict[str, TextIO]:
    """Lock ``count`` GPUs as soon as so many are free, and hold none until then.

    Returns:
        The entries of the GPUs in ``gpus``, and their locked files.
    """
    next_message = time.monotonic()
    while True:
        with locked_folder(folder):
            locks = lock_free_gpus(gpus, count, folder, holder)
            if len(locks) == count:
                return locks
            release(locks)
        if time.monotonic() >= next_message:
            busy = len(gpus) - len(locks)
            logging.info("waiting for free GPUs (%d needed): %d of %d are busy; see %s", count, busy, len(gpus), folder)
            next_message = time.monotonic() + SECONDS_BETWEEN_MESSAGES
        time.sleep(poll_seconds)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Wait until no other job looks for free GPUs, and keep the others waiting; takes milliseconds."""
    with no_umask(), suppress(FileExistsError):
        os.mkdir(folder, 0o1777)  # as /tmp: everybody may add files, and delete their own only
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def lock_free_gpus(gpus: dict[str, str], count: int, folder: Path, holder: str) -> dict[str, TextIO]:
    """Lock the first free GPUs, at most ``count``; the folder must be locked."""
    locks = {}
    for entry, name in gpus.items():
        lock = open_lock_file(folder / f"{re.sub('[^0-9A-Za-z-]', '_', name)}.lock")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.truncate(0)
            lock.write(holder)
            lock.flush()
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        locks[entry] = lock
        if len(locks) == count:
            break
    return locks


def open_lock_file(path: Path) -> TextIO:
    """Open the lock file of a GPU, which may be another user's; if there is none, create one that everybody may write."""

    def opener(path: str, flags: int) -> int:
        # O_CREAT only if need be: in a folder like /tmp, Linux refuses it for another user's file (fs.protected_regular).
        with suppress(FileNotFoundError):
            return os.open(path, flags | os.O_NOFOLLOW)
        with no_umask():
            return os.open(path, flags | os.O_NOFOLLOW | os.O_CREAT, 0o666)

    return open(path, "r+", encoding="ascii", opener=opener)


def release(locks: dict[str, TextIO]) -> None:
    """Close lock files, which drops their locks."""
    for lock in locks.values():
        lock.close()


@contextmanager
def no_umask() -> Iterator[None]:
    """Create files with exactly the permissions that are asked for."""
    former = os.umask(0)
    try:
        yield
    finally:
        os.umask(former)


@contextmanager
def environment(settings: dict[str, str]) -> Iterator[None]:
    """Set environment variables, and restore their former values at the end."""
    former = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
