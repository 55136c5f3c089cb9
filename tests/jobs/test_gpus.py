"""Jobs in real processes reserve GPUs of a simulated machine."""

import ctypes
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from longqlora.jobs import gpus
from longqlora.jobs.gpus import HELD_LOCKS, list_gpus, reserve_gpus, share_reservation, visible_gpus

TWO = ["GPU-aaaa", "GPU-bbbb"]
FOUR = [*TWO, "GPU-cccc", "GPU-bcde"]

PREAMBLE = """
import json, logging, os, signal, sys
from pathlib import Path
from longqlora.jobs.gpus import HELD_LOCKS, reserve_gpus, share_reservation
signal.alarm(20)  # ends a process that waits for ever, so that its test fails
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
def reserve(machine, count, folder, poll_seconds=0.02):
    return reserve_gpus("cuda", count, driver=lambda: machine, folder=Path(folder), poll_seconds=poll_seconds)
def next_order():
    return sys.stdin.readline()
"""
HOLD = """
with reserve(*json.loads(sys.argv[1])):
    print(os.environ[HELD_LOCKS], flush=True)
    next_order()
"""
SHARE = """
share_reservation()
print("shared", flush=True)
next_order()
"""
TAKE_TURNS = """
machine, count, folder = json.loads(sys.argv[1])
for _ in range(25):
    with reserve(machine, count, folder, 0.001):
        used = [Path(folder, f"in-use-{gpu}") for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
        for file in used:
            file.touch(exist_ok=False)
        for file in used:
            file.unlink()
"""


class Process:
    """A Python process that runs until the test tells it to end; its output is read line by line."""

    def __init__(self, code: str, *arguments: object, **environment: str):
        self.process = subprocess.Popen(
            [sys.executable, "-c", PREAMBLE + code, json.dumps(arguments)],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"} | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        return self.process.stdout.readline().strip()

    def end(self) -> int:
        self.process.communicate("\n", timeout=10)
        return self.process.returncode

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def start():
    """Starts processes, and at the end of the test kills those that still run."""
    started = []

    def start(*arguments: object, **environment: str) -> Process:
        started.append(Process(*arguments, **environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.process.communicate()


@pytest.fixture
def job(start, tmp_path):
    """Starts a job that reserves GPUs until the test tells it to end."""
    return lambda count=1, machine=TWO, **environment: start(HOLD, machine, count, str(tmp_path / "locks"), **environment)


@pytest.fixture
def reserve(tmp_path, monkeypatch):
    """Reserves GPUs in this process, without CUDA_VISIBLE_DEVICES and without an earlier reservation."""
    monkeypatch.delenv(HELD_LOCKS, raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return lambda count, machine=TWO: reserve_gpus("cuda", count, driver=lambda: machine, folder=tmp_path / "locks")


def reserved(process: Process) -> str:
    """Wait until a job has reserved GPUs, and return their entries in CUDA_VISIBLE_DEVICES."""
    line = process.line()
    assert line.startswith("reserved CUDA_VISIBLE_DEVICES="), line
    return line.partition("=")[2]


def is_waiting(process: Process) -> bool:
    """Whether the next line of a job's output says that it waits."""
    return process.line().startswith("waiting for free GPUs")


@pytest.mark.process
def test_jobs_at_the_same_time_get_different_gpus_and_one_too_many_waits_until_another_ends(job):
    first, second = job(), job()
    assert {reserved(first), reserved(second)} == {"0", "1"}
    third = job()
    assert third.line().startswith("waiting for free GPUs (1 needed): 2 of 2 are busy")
    assert first.end() == 0
    assert reserved(third) in ("0", "1")


@pytest.mark.process
def test_a_killed_job_frees_its_gpu(job):
    first = job(2)
    assert reserved(first) == "0,1"
    second = job()
    assert is_waiting(second)
    first.kill()
    assert reserved(second) == "0"


@pytest.mark.process
def test_a_gpu_stays_reserved_while_a_worker_of_a_killed_job_lives(job, start):
    killed = job(2)
    reserved(killed)
    worker = start(SHARE, **{HELD_LOCKS: killed.line()})
    assert worker.line() == "shared"
    killed.kill()
    other = job()
    assert is_waiting(other)
    assert worker.end() == 0
    assert reserved(other) == "0"


@pytest.mark.process
def test_a_worker_whose_job_is_gone_does_not_share_the_gpu_of_the_next_job(job, monkeypatch):
    killed = job()
    reserved(killed)
    locks = killed.line()
    killed.kill()
    following = job()
    assert reserved(following) == "0"
    monkeypatch.setenv(HELD_LOCKS, locks)
    with pytest.raises(RuntimeError, match=rf"process {killed.process.pid} since .* no longer holds .*GPU-aaaa"):
        share_reservation()


def test_a_worker_whose_lock_file_is_gone_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv(HELD_LOCKS, json.dumps({str(tmp_path / "GPU-aaaa.lock"): "process 1"}))
    with pytest.raises(RuntimeError, match="no longer holds"):
        share_reservation()


def test_without_a_reservation_there_is_nothing_to_share(monkeypatch):
    monkeypatch.delenv(HELD_LOCKS, raising=False)
    share_reservation()


@pytest.mark.process
def test_a_job_that_waits_for_two_gpus_holds_none(job):
    assert reserved(job()) == "0"
    assert is_waiting(job(2))
    assert reserved(job()) == "1"


@pytest.mark.process
@pytest.mark.parametrize("count", [1, 2])
def test_jobs_that_take_turns_never_deadlock_nor_share_a_gpu(start, tmp_path, count):
    jobs = [start(TAKE_TURNS, TWO, count, str(tmp_path)) for _ in range(3)]
    assert [job.end() for job in jobs] == [0, 0, 0]


@pytest.mark.process
def test_jobs_that_know_different_gpus_by_the_same_index_do_not_wait_for_each_other(job):
    first, second = job(machine=["GPU-aaaa"]), job(machine=["GPU-bbbb"])
    assert reserved(first) == reserved(second) == "0"


@pytest.mark.process
def test_an_index_and_a_uuid_of_one_gpu_exclude_each_other(job):
    first = job(CUDA_VISIBLE_DEVICES="1")
    assert reserved(first) == "1"
    assert is_waiting(job(CUDA_VISIBLE_DEVICES="GPU-bbbb"))


@pytest.mark.process
def test_sigterm_ends_a_job_that_waits(job):
    first = job(2)
    reserved(first)
    waiting = job()
    assert is_waiting(waiting)
    waiting.process.terminate()
    assert waiting.end() == -signal.SIGTERM


def test_the_first_free_gpus_are_visible_in_the_context_alone(reserve, monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    with reserve(2, FOUR):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
        assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert not {"CUDA_VISIBLE_DEVICES", HELD_LOCKS} & os.environ.keys()
    assert os.environ["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"


@pytest.mark.parametrize(
    ("visible", "chosen"),
    [("3,1", "3,1"), ("2,0,1", "2,0"), ("GPU-bcde, GPU-a", "GPU-bcde,GPU-a"), ("MIG-x/1/0,MIG-y,MIG-z", "MIG-x/1/0,MIG-y")],
)
def test_gpus_are_chosen_from_the_users_list_in_its_form_and_order(reserve, monkeypatch, visible, chosen):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    with reserve(2, FOUR):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == chosen
        assert "CUDA_DEVICE_ORDER" not in os.environ
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible


def test_the_environment_is_restored_and_the_gpus_are_free_after_an_error(reserve):
    with pytest.raises(KeyError), reserve(2):
        raise KeyError
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    with reserve(2):
        pass


@pytest.mark.parametrize(
    ("visible", "entries"),
    [
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("0,-1,1", ["0"]),
        ("1,4,0", ["1"]),
        ("0,0", []),
        ("0,GPU-aaaa", []),
        ("GPU-b,GPU-a", []),  # two UUIDs begin with GPU-b
        ("GPU-a,GPU-ffff", ["GPU-a"]),
    ],
)
def test_entries_count_as_cuda_reads_them(visible, entries):
    assert list(visible_gpus(FOUR, visible)) == entries


def test_uuids_are_taken_as_they_are_where_the_machines_are_unknown():
    assert visible_gpus(["0", "1"], "GPU-aaaa,GPU-bbbb") == {"GPU-aaaa": "GPU-aaaa", "GPU-bbbb": "GPU-bbbb"}


@pytest.mark.parametrize(
    ("machine", "visible", "message"),
    [
        (TWO, None, "3 GPUs are needed, but this machine has 2; lower training.num_processes or evaluation.num_processes"),
        (FOUR, "0,2", "3 GPUs are needed, but CUDA_VISIBLE_DEVICES='0,2' allows 2; lower .* device: cpu"),
        (TWO, "", "device: cuda is configured, but CUDA_VISIBLE_DEVICES='' allows no GPU; device: cpu runs without one"),
        ([], None, "device: cuda is configured, but nvidia-smi and torch find no GPU on this machine; device: cpu runs"),
        ([], "MIG-x", "nvidia-smi and torch find no GPU"),
    ],
)
def test_too_few_gpus_are_an_error_that_names_the_limit_and_what_to_change(reserve, monkeypatch, machine, visible, message):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ValueError, match=message), reserve(3, machine):
        pass


def test_a_cpu_needs_no_gpu(tmp_path):
    before = dict(os.environ)
    with reserve_gpus("cpu", 2, driver=lambda: pytest.fail("no need to count"), folder=tmp_path / "locks"):
        assert os.environ == before
    assert not (tmp_path / "locks").exists()


def test_lock_files_are_everybodys_whatever_the_umask(reserve, tmp_path):
    previous = os.umask(0o077)
    try:
        with reserve(1):
            pass
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "locks").stat().st_mode) == 0o1777
    assert stat.S_IMODE((tmp_path / "locks" / "GPU-aaaa.lock").stat().st_mode) == 0o666


def test_the_lock_file_of_another_user_is_opened_without_creating_or_changing_it(reserve, monkeypatch):
    with reserve(1):
        pass

    def refuse(*_):
        raise PermissionError

    def open_without_creating(path, flags, *mode, **keywords):
        return refuse() if flags & os.O_CREAT else real_open(path, flags, *mode, **keywords)

    real_open = os.open
    monkeypatch.setattr(os, "open", open_without_creating)
    for name in ("chmod", "fchmod"):
        monkeypatch.setattr(os, name, refuse)
    with reserve(1):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"


def test_a_symbolic_link_in_place_of_a_lock_file_is_not_written_through(reserve, tmp_path):
    (tmp_path / "locks").mkdir()
    (tmp_path / "private").write_text("mine")
    (tmp_path / "locks" / "GPU-aaaa.lock").symlink_to(tmp_path / "private")
    with pytest.raises(OSError, match=r"GPU-aaaa\.lock"), reserve(1):
        pass
    assert (tmp_path / "private").read_text() == "mine"


@pytest.mark.parametrize(("status", "started"), [(0, True), (3, False), (None, False)])
def test_cuda_that_has_started_is_noticed(monkeypatch, status, started):
    """The driver's library returns ``status``; if that is None, the library is missing."""

    class Driver:
        def __init__(self, _):
            if status is None:
                raise OSError

        def cuDeviceGetCount(self, _):
            return status

    monkeypatch.setattr(ctypes, "CDLL", Driver)
    assert gpus.cuda_has_started() is started


def test_cuda_must_not_have_started_unless_the_job_takes_all_gpus(reserve, monkeypatch):
    monkeypatch.setattr(gpus, "cuda_has_started", lambda: True)
    with pytest.raises(RuntimeError, match="this process would see 2, not 1"), reserve(1):
        pass
    with reserve(2):
        pass


def test_a_second_reservation_in_a_job_is_an_error_where_it_would_wait_for_itself(reserve):
    with reserve(1), pytest.raises(RuntimeError, match="has already reserved GPUs"), reserve(1):
        pass


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Simulates a machine: a program nvidia-smi on the path, or none, and a torch that counts this number of GPUs."""

    def machine(nvidia_smi: str | None, num_torch_gpus: int) -> None:
        programs, modules = tmp_path / "programs", tmp_path / "modules"
        programs.mkdir()
        modules.mkdir()
        if nvidia_smi is not None:
            (programs / "nvidia-smi").write_text(f"#!/bin/sh\n{nvidia_smi}\n")
            (programs / "nvidia-smi").chmod(0o755)
        (modules / "torch.py").write_text(
            "import os\nclass cuda:\n    @staticmethod\n    def device_count():\n"
            f"        return 0 if 'CUDA_VISIBLE_DEVICES' in os.environ else {num_torch_gpus}\n"
        )
        monkeypatch.setenv("PATH", str(programs))
        monkeypatch.setenv("PYTHONPATH", str(modules))

    return machine


@pytest.mark.process
def test_nvidia_smi_lists_gpus_by_uuid(machine):
    machine('[ "$*" = "--query-gpu=uuid --format=csv,noheader" ] && echo GPU-aaaa && echo GPU-bbbb', 0)
    assert list_gpus() == TWO


@pytest.mark.process
@pytest.mark.parametrize("nvidia_smi", [None, "echo No devices were found; exit 6", "echo GPU-aaaa; exit 15"])
def test_torch_counts_the_machines_gpus_where_nvidia_smi_does_not(machine, monkeypatch, nvidia_smi):
    machine(nvidia_smi, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert list_gpus() == ["0", "1"]


@pytest.mark.process
def test_the_module_imports_nothing_that_could_start_cuda():
    code = "import sys, longqlora.jobs.gpus; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(ROOT)).returncode == 0
