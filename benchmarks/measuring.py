"""Measures steps in processes of their own: time, peak memory, and an end where one takes too long or fails.

Memory is that of the process, or of torch's allocator on a GPU, which does not see a paged optimizer's state.
"""

import ctypes
import multiprocessing
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

MIB, GIB = 2**20, 2**30


def status_bytes(key: str, path: str = "/proc/self/status") -> int:
    """A quantity of this process or machine from Linux, in bytes."""
    (line,) = (line for line in Path(path).read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def held_memory(device: torch.device) -> int:
    """Bytes that this process holds; the peak begins anew from here."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # what loading has left
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held since :func:`held_memory`."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else status_bytes("VmHWM")


def limit_memory() -> None:
    """Let an allocation fail that goes beyond what the machine has free now, less 1 GiB; Linux would kill some process."""
    limit = status_bytes("VmData") + max(0, status_bytes("MemAvailable", "/proc/meminfo") - GIB)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))


def timed(step: Callable[[], float], device: torch.device) -> dict:
    """Take a step, which returns the loss; report it, its time, the time of the CPU (of all threads, without what others take
    of a shared machine), and the peak."""
    if device.type == "cpu":
        limit_memory()
    started, cpu_started = time.perf_counter(), time.process_time()
    loss = step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "loss": loss, "peak_bytes": peak_memory(device)}


def best_seconds(function: Callable[[], object], on_gpu: bool, rounds: int = 5) -> float:
    """Shortest time of a call; on a GPU ten calls are made at once, as launching one costs some microseconds."""
    calls, best = 10 if on_gpu else 1, float("inf")
    for _ in range(rounds):
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            function()
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - started) / calls)
    return best


def serve(connection, set_up: Callable, arguments: tuple) -> None:
    """Body of a process: set up, report, then take a step for every message."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its children
    warnings.simplefilter("ignore", FutureWarning)
    try:
        report, step = set_up(*arguments)
        connection.send(report)
        while connection.recv():
            connection.send(step())
    except Exception as error:
        exhausted = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
        if not exhausted:
            traceback.print_exc()
        connection.send({"failure": "out of memory" if exhausted else f"{type(error).__name__}: {error}".splitlines()[0]})


class Child:
    """A process that sets something up and takes steps on request, for at most ``time_limit`` seconds in all."""

    def __init__(self, set_up: Callable, *arguments, time_limit: float):
        context = multiprocessing.get_context("spawn")  # a fresh process has a fresh peak
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, set_up, arguments), daemon=True)
        self.time_limit, self.left, self.waits = time_limit, time_limit, False
        self.process.start()
        theirs.close()

    def answer(self) -> dict:
        """The process's next report, or why there is none: ``{"failure": …}``."""
        started = time.perf_counter()
        try:
            if self.connection.poll(max(0, self.left)):
                report = self.connection.recv()
                self.waits = "failure" not in report
                return report
            return {"failure": f"over the time limit of {self.time_limit:g} s"}
        except EOFError:
            self.process.join()
            return {"failure": f"ended with exit code {self.process.exitcode}; out of memory?"}
        finally:
            self.left -= time.perf_counter() - started

    def take_step(self, time_limit: float | None = None) -> dict:
        """Let the process take a step; from this one on it has ``time_limit`` seconds, if given."""
        if time_limit is not None:
            self.time_limit = self.left = time_limit
        self.waits = False
        self.connection.send(True)
        return self.answer()

    def stop(self) -> None:
        """End the process: one that waits for a message by telling it, any other at once."""
        if self.waits:
            self.connection.send(False)
            self.process.join(5)
        self.process.kill()
        self.process.join()


def measure_together(rows: list[dict], *, set_up_of: Callable, repetitions: int, time_limit: float, save: Callable) -> None:
    """Measure cases in turn, each in its own process; write into the rows what they report.

    Args:
        rows: one for each case: shape, tokens, case; they get loaded_bytes, peak_bytes, first_loss, seconds and cpu_seconds
            (lists) and, where there is one, failure.
        set_up_of: row -> arguments of its :class:`Child`.
        save: called after each report.
    """
    children = []
    try:
        children += [Child(*set_up_of(row), time_limit=time_limit) for row in rows]  # they load side by side
        for row, child in zip(rows, children, strict=True):
            row.update(child.answer(), seconds=[], cpu_seconds=[])
            end_failed(row, child)
        for number in range(1 + repetitions):
            for row, child in zip(rows, children, strict=True):
                if "failure" not in row:
                    print(f"{row['shape']}, {row['tokens']} tokens, {row['case']}, step {number} …", file=sys.stderr)
                    write_down(row, child.take_step(), counted=number > 0)
                    end_failed(row, child)
                    save()
    finally:
        for child in children:
            child.stop()


def write_down(row: dict, report: dict, counted: bool) -> None:
    """Write what a step reports into the row of its case; of a step that is not counted, the loss instead of the times."""
    for key, value in report.items():
        if key in ("seconds", "cpu_seconds"):
            row[key] += [value] if counted else []
        elif key != "loss":
            row[key] = value
        elif not counted:
            row["first_loss"] = value


def end_failed(row: dict, child: Child) -> None:
    """End the process of a case that has failed, so that its memory is free for the others."""
    if "failure" in row:
        print(f"    {row['failure']}", file=sys.stderr)
        child.stop()
