"""Reserve GPUs: a job waits until as many GPUs of its machine are free as it needs, reserves them, and sees only these.

Snakemake counts GPUs but does not assign them to jobs, and transformers trains on all GPUs that it sees.

Each GPU has a lock file, in a folder that all users of the machine share. The operating system releases a lock when all
processes that hold it have ended, even after SIGKILL.

- A job takes an exclusive lock on a GPU's file, which fails while any other process has a lock on it. Then it converts the
  lock into a shared one.
- The processes that the job starts with torchrun take a shared lock too (:func:`share_reservation`). If one of them outlives
  the job, the GPU stays reserved.
- A job locks the folder while it searches for free GPUs, so that only one job searches at a time. No other job can take a GPU
  while its lock is converted, or finds a GPU busy only because another search has locked it for a moment.

This module uses the standard library only and never starts CUDA, which reads CUDA_VISIBLE_DEVICES only once, when it starts.
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

# Not tempfile.gettempdir(): TMPDIR may be different for each job, or lie on a network file system.
LOCK_FOLDER = Path("/tmp/longqlora-gpus")
VISIBLE = "CUDA_VISIBLE_DEVICES"
HELD_LOCKS = "LONGQLORA_GPU_LOCKS"  # JSON: the path of each lock file that the job holds → the text that it wrote into it
SECONDS_BETWEEN_MESSAGES = 600


def list_gpus() -> list[str]:
    """Names of this machine's GPUs in the order of their indices: UUIDs if nvidia-smi lists them, otherwise the indices.

    Locks need UUIDs, because a cluster may show each job only the GPUs that it has allocated to it: then the same index means
    different GPUs in different jobs.
    """
    return uuids_by_nvidia_smi() or indices_by_torch()


def uuids_by_nvidia_smi() -> list[str]:
    """UUIDs of the GPUs, or an empty list if nvidia-smi is missing or fails."""
    command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        return []
    return [line.strip() for line in lines if line.startswith("GPU-")]


def indices_by_torch() -> list[str]:
    """Indices of the GPUs that torch counts, in another process because counting starts CUDA if torch finds no NVML."""
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
    """Wait until ``count`` GPUs are free, reserve them, and let CUDA see only these until the context ends.

    Enter the context before anything starts CUDA. Importing bitsandbytes starts it, and so does importing peft. Indices in
    CUDA_VISIBLE_DEVICES are read in nvidia-smi's order. On a machine with different GPUs, CUDA uses the same order only with
    CUDA_DEVICE_ORDER=PCI_BUS_ID.

    Args:
        device: ``cuda``; with ``cpu`` nothing is reserved.
        count: number of GPUs that the job needs, at least 1.
        driver: lists the machine's GPUs as :func:`list_gpus` does.
        folder: folder of the lock files, on a local file system.
        poll_seconds: time between two searches for free GPUs.

    Raises:
        ValueError: if the machine has, or CUDA_VISIBLE_DEVICES allows, fewer than ``count`` GPUs.
        RuntimeError: if CUDA has started in this process and sees more than ``count`` GPUs, or if this process, or the job that
            started it, has already reserved GPUs.
    """
    if device == "cpu":
        yield
        return
    if HELD_LOCKS in os.environ:
        raise RuntimeError("this process has already reserved GPUs: a second reservation would wait for the first one")
    gpus = enough_gpus(count, driver())
    holder = f"process {os.getpid()} since {datetime.now().isoformat()}"  # readable, and different for each job
    locks = wait_for_gpus(gpus, count, folder, holder, poll_seconds)
    settings = {VISIBLE: ",".join(locks), HELD_LOCKS: json.dumps({lock.name: holder for lock in locks.values()})}
    if VISIBLE not in os.environ:
        settings["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # the order in which nvidia-smi lists GPUs
    logging.info("reserved %s=%s", VISIBLE, settings[VISIBLE])
    try:
        with environment(settings):
            yield
    finally:
        release(locks)


def enough_gpus(count: int, machine: list[str]) -> dict[str, str]:
    """The GPUs that this process may use, as :func:`visible_gpus` returns them, if there are ``count`` or more of them.

    Raises:
        ValueError: if there are fewer.
        RuntimeError: if CUDA has started in this process and sees more than ``count`` GPUs.
    """
    visible = os.environ.get(VISIBLE)
    gpus = visible_gpus(machine, visible)
    if len(gpus) < count:
        raise ValueError(too_few_gpus(count, gpus, machine, visible))
    if len(gpus) > count and cuda_has_started():
        raise RuntimeError(f"CUDA has started before GPUs were reserved: this process would see {len(gpus)}, not {count}")
    return gpus


def share_reservation() -> None:
    """Keep the GPUs of the job that started this process reserved until this process ends. Without a reservation, do nothing.

    Raises:
        RuntimeError: if that job has ended, because another job may have reserved its GPUs since.
    """
    for path, holder in json.loads(os.environ.get(HELD_LOCKS, "{}")).items():
        try:
            lock = os.open(path, os.O_RDONLY)  # never closed, so that the lock lasts until the process ends
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            is_ours = os.read(lock, 1000).decode() == holder  # otherwise another job has reserved the GPU
        except (BlockingIOError, FileNotFoundError):
            is_ours = False
        if not is_ours:
            raise RuntimeError(f"the job that reserved a GPU for this process ({holder}) no longer holds {path}")


def visible_gpus(machine: list[str], visible: str | None) -> dict[str, str]:
    """The GPUs that CUDA shows, in its order.

    Args:
        machine: names of all GPUs.
        visible: value of CUDA_VISIBLE_DEVICES, or None if it is not set.

    Returns:
        Entry of each GPU in CUDA_VISIBLE_DEVICES → its name, which the lock file is named after.
    """
    if visible is None:
        return {str(index): name for index, name in enumerate(machine)}
    found: dict[str, str] = {}
    for entry in map(str.strip, visible.split(",")):
        name = gpu_name(entry, machine)
        if name is None:
            break  # CUDA ignores an invalid entry and all entries after it
        if name in found.values():
            return {}  # CUDA shows no GPU at all if one is listed twice
        found[entry] = name
    return found


def gpu_name(entry: str, machine: list[str]) -> str | None:
    """Name of the GPU that an entry of CUDA_VISIBLE_DEVICES refers to, or None if there is no such GPU.

    An entry is an index, the beginning of a UUID, or a part of a GPU (MIG), which has a lock of its own.
    """
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
    """Error message that names the number of GPUs needed, the number available, and the settings to change."""
    if not machine:
        return "device: cuda is configured, but nvidia-smi and torch find no GPU on this machine; device: cpu runs without one"
    if not gpus:
        return f"device: cuda is configured, but {VISIBLE}={visible!r} allows no GPU; device: cpu runs without one"
    limit = "this machine has" if visible is None else f"{VISIBLE}={visible!r} allows"
    settings = "training.num_processes or evaluation.num_processes"
    return f"{count} GPUs are needed, but {limit} {len(gpus)}; lower {settings}, or set device: cpu to run without a GPU"


def cuda_has_started() -> bool:
    """Whether anything in this process has started CUDA, be it only to find out whether there is a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) == 0  # before CUDA starts, the driver returns an error


def wait_for_gpus(gpus: dict[str, str], count: int, folder: Path, holder: str, poll_seconds: float) -> dict[str, TextIO]:
    """Wait until ``count`` GPUs are free, and lock them. While waiting, no GPU is locked.

    Returns:
        Entry of each locked GPU in ``gpus`` → its lock file.
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
    """Wait until no other job has locked the folder, and lock it until the context ends; jobs do so for milliseconds."""
    with no_umask(), suppress(FileExistsError):
        os.mkdir(folder, 0o1777)  # like /tmp: all users may add files but delete only their own
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def lock_free_gpus(gpus: dict[str, str], count: int, folder: Path, holder: str) -> dict[str, TextIO]:
    """Lock the first free GPUs, at most ``count``. The caller must have locked the folder."""
    locks: dict[str, TextIO] = {}
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
    """Open the lock file of a GPU, which may belong to another user. If it is missing, create it, writable for all users."""

    def opener(path: str, flags: int) -> int:
        # First without O_CREAT: in a folder like /tmp, Linux denies it for another user's file (fs.protected_regular).
        with suppress(FileNotFoundError):
            return os.open(path, flags | os.O_NOFOLLOW)
        with no_umask():
            return os.open(path, flags | os.O_NOFOLLOW | os.O_CREAT, 0o666)

    return open(path, "r+", encoding="ascii", opener=opener)


def release(locks: dict[str, TextIO]) -> None:
    """Close lock files, which releases their locks."""
    for lock in locks.values():
        lock.close()


@contextmanager
def no_umask() -> Iterator[None]:
    """Create files with exactly the requested permissions."""
    previous = os.umask(0)
    try:
        yield
    finally:
        os.umask(previous)


@contextmanager
def environment(settings: dict[str, str]) -> Iterator[None]:
    """Set environment variables, and restore their previous values at the end."""
    previous = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
