"""The lines of a run, from records as Snakemake logs them."""

import io
import logging
import time

import pytest

from longqlora.jobs.progress import step_of
from longqlora.jobs.retries import last_line, leave_mark, mark_of
from longqlora.jobs.terminal import Terminal, pause

LABELS = {"system": {"longqlora": "LongQLoRA to 256"}}
RESULTS = {"table.md": "the table", "plots/perplexity.png": "the plot"}
EXIT = "RuleException:\nCalledProcessError in file train.smk, line 70:\nCommand '…' "


class Run:
    """A run of Snakemake: what it logs, and the lines on the terminal."""

    def __init__(self):
        self.stream, self.logger = io.StringIO(), logging.Logger("snakemake")
        handler = logging.StreamHandler(self.stream)
        handler.name = "DefaultStreamHandler"
        self.logger.addHandler(handler)
        titles = {"train": "train {wildcards.system}", "table": "table"}
        self.terminal = Terminal(titles, LABELS, lambda: RESULTS)
        self.terminal.replace(self.logger)
        self.log("run_info", stats={"train": 11, "table": 1, "all": 1, "total": 13})

    def log(self, event=None, message="", level=logging.INFO, **values):
        self.logger.log(level, message, extra={"event": event, **values})

    def start(self, job=1, rule="train", log=(), **wildcards):
        self.log("job_info", jobid=job, rule_name=rule, wildcards=wildcards or {"system": "longqlora"}, log=list(map(str, log)))

    def fail(self, exit_text="returned non-zero exit status 1.", cluster=None, job=1, logs=()):
        self.log("error", EXIT + exit_text, level=logging.ERROR)
        own = self.terminal.jobs[job].log
        logs = [*([str(own)] if own else []), *map(str, logs)]
        self.log("job_error", "Error in rule train", level=logging.ERROR, jobid=job, rule_msg=cluster, log=logs)

    def later(self, seconds):
        """Let the jobs have run for so long, and show their progress."""
        for job in self.terminal.jobs.values():
            job.started, job.due = job.started - seconds, job.due - seconds
        self.terminal.show_progress()

    @property
    def lines(self):
        return self.stream.getvalue().splitlines()


@pytest.fixture
def run():
    run = Run()
    yield run
    run.terminal.close()


def test_jobs_are_numbered_as_they_start_and_called_by_their_labels(run):
    run.start(job=7)
    run.start(job=3, system="base")
    assert run.lines == ["12 jobs to run", "[ 1 of 12] train LongQLoRA to 256", "[ 2 of 12] train base"]


def test_targets_are_neither_shown_nor_counted(run):
    run.start(rule="all")
    run.log("job_finished", job_id=1)
    assert run.lines == ["12 jobs to run"]


def test_snakemakes_noise_is_hidden_and_other_messages_and_errors_are_shown(run):
    run.log(message="Building DAG of jobs...")
    run.log("shellcmd", "Shell command: None")
    run.log(message="Creating conda environment environment.yml...")
    run.log("error", "MissingInputException: corpus.jsonl", level=logging.ERROR)
    run.log(message="disk is almost full", level=logging.WARNING)
    shown = ["Creating conda environment environment.yml...", "MissingInputException: corpus.jsonl", "disk is almost full"]
    assert run.lines[1:] == shown


def test_a_long_job_shows_its_steps_and_its_end(run, tmp_path):
    log = tmp_path / "train.log"
    run.start(log=[log])
    log.write_text(f"12:00:00 INFO {step_of(30, 60, 18)}: loss 4.1\n")
    run.later(5)
    run.later(11)
    run.later(1)
    run.log("job_finished", job_id=1)
    assert run.lines[2:] == [
        "[ 1 of 12] train LongQLoRA to 256: step 30 of 60, 18 s left",
        "[ 1 of 12] train LongQLoRA to 256: done in 17 s",
    ]


def test_a_long_job_without_steps_shows_how_long_it_runs(run):
    run.start()
    run.later(75)
    assert run.lines[2:] == ["[ 1 of 12] train LongQLoRA to 256: running for 1 min 15 s"]


def test_a_job_that_waits_in_the_queue_of_a_cluster_is_not_shown_as_running(run, tmp_path):
    log = tmp_path / "train.log"
    run.start(log=[log])
    run.later(75)
    assert run.lines[2:] == []
    log.touch()
    run.later(1)
    run.later(20)
    run.log("job_finished", job_id=1)
    assert run.lines[2:] == [
        "[ 1 of 12] train LongQLoRA to 256: running for 20 s",
        "[ 1 of 12] train LongQLoRA to 256: done in 20 s",
    ]


def test_what_the_executor_says_again_for_each_job_is_shown_once(run):
    for _ in range(2):
        run.log(message="No wall time information given. This might or might not work.", level=logging.WARNING)
    run.log(message="\nUnable to guess SLURM account. Trying to proceed without.", level=logging.WARNING)
    run.log(message="\nUnable to guess SLURM account. Trying to proceed without.", level=logging.WARNING)
    assert "".join(run.lines).count("No wall time information given") == 1
    assert "".join(run.lines).count("Unable to guess SLURM account") == 1


def test_a_run_of_hours_does_not_flood_the_terminal():
    elapsed, lines = 0.0, 0
    while elapsed < 10 * 3600:
        elapsed, lines = elapsed + pause(elapsed), lines + 1
    assert pause(0) == 15
    assert lines < 100


def test_the_reason_of_a_failure_is_the_last_that_is_seen(run, tmp_path):
    log = tmp_path / "train.log"
    run.start(log=[log])
    log.write_text(
        "12:00:00 ERROR the job failed\nTraceback\n12:00:01 ERROR error: too few texts\n  Lower num_texts\nExiting\n"
    )
    run.fail()
    run.start(job=2, system="base")
    run.log("error", "WorkflowError:\nAt least one job did not complete successfully.", level=logging.ERROR)
    run.terminal.stopped()
    assert run.lines[2] == "[ 1 of 12] train LongQLoRA to 256: failed after 0 s: too few texts"
    assert "0 of 12 jobs done" in run.lines[5]
    assert run.lines[7:] == [
        "Failed: train LongQLoRA to 256", f"  log: {log}", "  reason: too few texts", "    Lower num_texts",
    ]  # fmt: skip


def test_an_error_of_an_earlier_run_is_not_taken_for_the_reason(run, tmp_path):
    log = tmp_path / "train.log"
    log.write_text("12:00:01 ERROR error: too few texts\n")
    run.start(log=[log])
    run.terminal.jobs[1].started = time.time() + 60
    run.fail()
    assert "too few" not in run.lines[-1]
    assert "(non-zero exit status 1)" in run.lines[-1]


@pytest.mark.parametrize("exit_text", ["died with <Signals.SIGKILL: 9>.", "returned non-zero exit status 137."])
def test_a_job_that_was_killed_says_so(run, exit_text):
    run.start()
    run.fail(exit_text)
    assert "killed, probably because memory ran out" in run.lines[-1]


def test_the_last_lines_of_a_log_without_an_error_are_shown(run, tmp_path):
    log = tmp_path / "train.log"
    run.start(log=[log])
    log.write_text("".join(f"line {number}\n" for number in range(9)) + "Segmentation fault\n")
    run.fail("returned non-zero exit status 139.")
    run.terminal.stopped()
    assert run.lines[-6:] == [
        "  reason: ended without saying why (non-zero exit status 139)",
        *(f"  line {number}" for number in range(5, 9)),
        "  Segmentation fault",
    ]


def test_a_cluster_says_why_a_job_failed(run):
    run.start()
    run.fail("returned non-zero exit status 1.", cluster="SLURM status is TIMEOUT")
    assert "SLURM status is TIMEOUT" in run.lines[-1]


SLURM = (
    "SLURM-job '7_2' failed, SLURM status is: '{state}'. Detailed failure reason unavailable (status command is not 'sacct')."
    "For further error details see the cluster/cloud log and the log files of the involved rule(s)."
)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("OUT_OF_MEMORY", "killed, because it took more memory than it had asked for (mem_mb)"),
        ("TIMEOUT", "killed, because it took longer than it had asked for (runtime)"),
        ("CANCELLED", "canceled"),
        ("FAILED", "ended without saying why"),
    ],
)
def test_the_state_of_a_slurm_job_is_its_reason(run, state, reason):
    run.start()
    run.fail(cluster=SLURM.format(state=state))
    run.terminal.stopped()
    assert run.lines[-1] == f"  reason: {reason} ({state} in SLURM, job 7_2)"


def test_a_slurm_job_that_says_itself_why_it_ended_is_asked_first_unless_it_was_stopped(run, tmp_path):
    log = tmp_path / "train.log"
    run.start(log=[log])
    log.write_text("12:00:01 ERROR error: ended by SIGTERM after step 7 of 9\n")
    run.fail(cluster=SLURM.format(state="FAILED"))
    assert run.lines[-1].endswith("failed after 0 s: ended by SIGTERM after step 7 of 9")
    run.start(log=[log])
    run.fail(cluster=SLURM.format(state="TIMEOUT"))
    run.terminal.stopped()
    assert "took longer" in run.lines[-2]
    assert run.lines[-1] == "  ended by SIGTERM after step 7 of 9"


def test_a_job_that_slurm_does_not_take_says_why_without_its_command(run):
    run.start()
    run.fail(cluster="SLURM sbatch failed. The error message was 'sbatch: error: Invalid account'.\n    sbatch call:\n  …")
    run.terminal.stopped()
    assert run.lines[-1] == "  reason: SLURM did not take the job: sbatch: error: Invalid account"


def test_the_log_of_the_cluster_is_named_and_shown_if_the_job_has_written_none(run, tmp_path):
    log = tmp_path / "rule_train/7_2.log"
    run.start(log=[tmp_path / "train.log"])
    log.parent.mkdir()
    log.write_text("ModuleNotFoundError: No module named 'snakemake'\n")
    named = log.parent / "longqlora" / log.name  # as the executor names the log of a job in an array
    run.fail(cluster=SLURM.format(state="FAILED"), logs=[named])
    run.terminal.stopped()
    assert run.lines[-4:] == [
        f"  log: {tmp_path / 'train.log'}",
        f"  log of the cluster: {log}",
        "  reason: ended without saying why (FAILED in SLURM, job 7_2)",
        "  ModuleNotFoundError: No module named 'snakemake'",
    ]


def test_what_the_executor_says_of_each_job_is_hidden(run):
    run.log(message="Job 3 has been submitted with SLURM jobid 4 (log: rule_train/4.log).")
    run.log(message="Submitted array job with Snakemake IDs 2,5 and SLURM job ID 6. The individual task IDs are 1-2.")
    assert run.lines == ["12 jobs to run"]


def test_a_job_that_is_tried_again_keeps_its_number_and_has_not_failed(run):
    run.start()
    run.fail()
    run.log(message="Trying to restart job 1.")
    run.start()
    run.terminal.stopped()
    assert run.lines[3] == "[ 1 of 12] train LongQLoRA to 256: attempt 2"
    assert not any(line.startswith("Failed") for line in run.lines)


def test_attempts_that_end_at_once_are_not_shown(run, tmp_path):
    log = tmp_path / "train.log"
    run.start(log=[log])
    log.write_text("12:00:01 ERROR error: the loss is nan\n")
    leave_mark(log)
    run.fail()
    for number in (2, 3):
        run.log(message="Trying to restart job 1.")
        run.start(log=[log])
        run.later(30)
        mark_of(log).write_text(mark_of(log).read_text() + last_line(number))
        log.touch()
        run.fail()
    run.terminal.stopped()
    assert [line for line in run.lines if "nan" in line or ": attempt" in line] == [
        "[ 1 of 12] train LongQLoRA to 256: failed after 0 s: the loss is nan",
        "  reason: the loss is nan",
    ]


def test_jobs_that_ctrl_c_ends_have_not_failed(run, tmp_path):
    log = tmp_path / "train.log"
    run.start(log=[log])
    run.start(job=2, system="base")
    log.write_text("12:00:01 ERROR error: Interrupted: ended by SIGINT after step 7 of 9; a rerun resumes from there\n")
    run.log(message="Terminating processes on user request, this might take some time.")
    run.fail("died with <Signals.SIGINT: 2>", job=2)
    run.fail()
    run.terminal.stopped()
    assert run.lines[4:6] == [
        "[ 2 of 12] train base: interrupted",
        "[ 1 of 12] train LongQLoRA to 256: ended by SIGINT after step 7 of 9; a rerun resumes from there",
    ]
    assert run.lines[-1].endswith("0 of 12 jobs done. The same command continues from there.")


def test_a_run_ends_with_the_files_to_look_at(run):
    run.terminal.succeeded()
    assert run.lines[2].startswith("Done in ")
    assert run.lines[3:] == ["  table.md              the table", "  plots/perplexity.png  the plot"]


def test_without_jobs_the_files_to_look_at_are_named_too(run):
    run.log(message="Nothing to be done (all requested files are present and up to date).")
    assert run.lines[1] == "All files are up to date. Look at"
    assert run.lines[2:] == ["  table.md              the table", "  plots/perplexity.png  the plot"]


def test_a_logger_plugin_keeps_its_place():
    logger, handler = logging.Logger("snakemake"), logging.NullHandler()
    logger.addHandler(handler)
    Terminal({}, {}, dict).replace(logger)
    assert logger.handlers == [handler]
