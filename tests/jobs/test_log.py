"""The log of a job, in a process of its own, because it sets up the whole process."""

import subprocess
import sys

import pytest

SCRIPT = """
import logging, sys
from longqlora.jobs.log import job_log
with job_log(sys.argv[1]):
    logging.info("a line")
    {}
"""


def run(root, path, statement: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", SCRIPT.format(statement), str(path)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


@pytest.mark.process
def test_a_log_begins_anew_and_has_the_lines_of_the_job(root, tmp_path):
    path = tmp_path / "logs/job.log"
    for _ in range(2):
        assert run(root, path, "pass").returncode == 0
    assert path.read_text().count("INFO a line") == 1


@pytest.mark.process
@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("raise ValueError('too few texts')", "too few texts"),
        ("raise OSError('disk full')", "OSError: disk full"),
        ("raise KeyboardInterrupt", "interrupted"),
    ],
)
def test_the_last_line_of_a_failed_job_is_its_error_and_the_terminal_stays_free(root, tmp_path, statement, reason):
    process = run(root, tmp_path / "job.log", statement)
    assert (process.returncode, process.stdout + process.stderr) == (1, "")
    assert (tmp_path / "job.log").read_text().splitlines()[-1].endswith(f"ERROR error: {reason}")
