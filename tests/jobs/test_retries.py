"""Which errors are worth another attempt, and when a job ends at once because of the attempt before it."""

import errno
import socket
import subprocess
import sys
import urllib.error

import httpx2
import pytest
import requests
import torch
from huggingface_hub.errors import OfflineModeIsEnabled

from longqlora.config.validation import ConfigError
from longqlora.jobs.retries import LostProcesses, is_worth_a_retry
from longqlora.training.trainer import Interrupted, NonFiniteLoss

PASSING = [
    MemoryError("out of memory training at 8192 tokens"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    Interrupted("ended by SIGTERM after step 7 of 9"),
    LostProcesses("one of 2 processes failed: exit status 1"),
    RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:8216"),
    RuntimeError("NCCL Error 6: unhandled system error"),
    RuntimeError("[Rank 1] Watchdog caught collective operation timeout: WorkNCCL ran for 600 s before timing out."),
    ConnectionResetError("Connection reset by peer"),
    socket.gaierror(-3, "Temporary failure in name resolution"),
    OSError(errno.ENETUNREACH, "Network is unreachable"),
    httpx2.ConnectError("[Errno 111] Connection refused"),
    requests.ReadTimeout("Read timed out."),
    urllib.error.HTTPError("https://example.com/a", 503, "Service Unavailable", None, None),
    httpx2.HTTPStatusError("429", request=httpx2.Request("GET", "https://example.com"), response=httpx2.Response(429)),
]
LASTING = [
    NonFiniteLoss("the loss of step 7 is nan"),
    ConfigError(["training: unknown key 'rnk'"]),
    ValueError("the tokens were made with another tokenizer"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    FileNotFoundError(errno.ENOENT, "No such file or directory", "corpus.jsonl"),
    OSError(errno.ENOSPC, "No space left on device"),
    OfflineModeIsEnabled("offline mode is enabled"),
    urllib.error.HTTPError("https://example.com/a", 404, "Not Found", None, None),
    KeyError("a"),
]


@pytest.mark.parametrize("error", PASSING, ids=lambda error: str(error)[:40])
def test_what_may_pass_is_worth_a_retry(error):
    assert is_worth_a_retry(error)


@pytest.mark.parametrize("error", LASTING, ids=lambda error: str(error)[:40])
def test_what_would_come_again_is_not(error):
    assert not is_worth_a_retry(error)


def test_an_error_of_the_network_is_found_below_the_message_that_replaces_it():
    def read():
        try:
            raise ConnectionResetError("reset")
        except OSError as error:
            raise ValueError(f"https://example.com/a.jsonl: cannot be read ({error})") from None

    with pytest.raises(ValueError, match="cannot be read") as caught:
        read()
    assert is_worth_a_retry(caught.value)


def test_an_error_of_the_network_that_was_dealt_with_is_no_reason():
    def read():
        try:
            raise ConnectionResetError("reset")
        except OSError:
            return {}["a"]

    with pytest.raises(KeyError) as caught:
        read()
    assert not is_worth_a_retry(caught.value)


SCRIPT = """
import sys
from types import SimpleNamespace
snakemake = SimpleNamespace(log=[sys.argv[1]], resources=SimpleNamespace(attempt=int(sys.argv[2])))
from longqlora.jobs.log import job_log
print("started")
with job_log(snakemake.log[0]):
    STATEMENT
"""


def attempt(root, log, number: int, statement: str) -> tuple[int, str]:
    """Exit status and output of an attempt of a job whose script starts as Snakemake's does."""
    command = [sys.executable, "-c", SCRIPT.replace("STATEMENT", statement), str(log), str(number)]
    process = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert process.stderr == ""
    return process.returncode, process.stdout.strip()


def attempts(root, log, numbers: range, statement: str) -> list[tuple[int, str]]:
    """Attempts of a job as Snakemake makes them: it removes the log before each."""
    ended = []
    for number in numbers:
        log.unlink(missing_ok=True)
        ended.append(attempt(root, log, number, statement))
    return ended


FAIL = "raise ValueError('the loss is nan')"


@pytest.mark.process
def test_attempts_after_an_error_that_remains_end_before_they_start_and_a_new_run_starts_again(root, tmp_path):
    log = tmp_path / "job.log"
    assert attempts(root, log, range(1, 2), FAIL) == [(1, "started")]
    first = log.read_text()
    assert attempts(root, log, range(2, 4), FAIL) == [(1, ""), (1, "")]
    assert log.read_text().startswith(first)
    assert "ERROR error: the loss is nan\n" in first
    assert attempts(root, log, range(1, 2), "pass") == [(0, "started")]
    assert log.read_text() == ""
    assert list(tmp_path.iterdir()) == [log]


@pytest.mark.process
@pytest.mark.parametrize("failure", ["raise MemoryError('out of memory')", "import os; os.kill(os.getpid(), 9)"])
def test_attempts_after_a_kill_or_exhausted_memory_start_again(root, tmp_path, failure):
    log = tmp_path / "job.log"
    assert attempts(root, log, range(1, 3), failure)[1] in [(1, "started"), (-9, "started")]
    assert attempts(root, log, range(3, 4), "pass") == [(0, "started")]


@pytest.mark.process
def test_a_mark_of_an_earlier_run_does_not_stop_the_attempt_after_one_that_was_killed_before_it_began(root, tmp_path):
    log = tmp_path / "job.log"
    attempts(root, log, range(1, 4), FAIL)
    assert attempts(root, log, range(2, 3), "pass") == [(0, "started")]
