"""The log of a job, in a process of its own, because it sets up the whole process."""

import subprocess
import sys

import pytest

SCRIPT = """
import logging, sys
from longqlora.jobs.log import job_log
with job_log(sys.argv[1]):
    logging.info("a line")
    STATEMENT
"""


def run(root, path, statement: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", SCRIPT.replace("STATEMENT", statement), str(path)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


@pytest.mark.process
def test_a_log_begins_anew_and_has_what_the_job_logs_and_prints(root, tmp_path):
    path = tmp_path / "logs/job.log"
    for _ in range(2):
        process = run(root, path, "print('printed'); import os; os.system('echo from a process')")
        assert (process.returncode, process.stdout + process.stderr) == (0, "")
    assert [line.split("INFO ")[-1] for line in path.read_text().splitlines()] == ["a line", "printed", "from a process"]


@pytest.mark.process
@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("raise ValueError('too few texts')", "too few texts"),
        ("raise ValueError('too few\\ntexts')", "too few\n  texts"),
        ("raise OSError('disk full')", "OSError: disk full"),
        ("raise KeyboardInterrupt", "interrupted"),
    ],
)
def test_the_log_of_a_failed_job_ends_with_its_error_and_the_terminal_stays_free(root, tmp_path, statement, reason):
    process = run(root, tmp_path / "job.log", statement)
    assert (process.returncode, process.stdout + process.stderr) == (1, "")
    assert (tmp_path / "job.log").read_text().endswith(f"ERROR error: {reason}\n")


IMPORTS = """
import gc, sys
from longqlora.jobs.log import importing, job_log

assert not gc.isenabled()
with job_log(sys.argv[1]):
    frozen = gc.get_freeze_count()
    assert gc.isenabled() and frozen > 0
    with importing():
        assert not gc.isenabled()
        import xml.dom.minidom
    assert gc.isenabled() and gc.get_freeze_count() > frozen
    try:
        with importing():
            import a_module_that_does_not_exist
    except ModuleNotFoundError:
        assert gc.isenabled()
"""


@pytest.mark.process
def test_modules_are_imported_without_garbage_collection(root, tmp_path):
    subprocess.run([sys.executable, "-c", IMPORTS, str(tmp_path / "job.log")], cwd=root, check=True)
