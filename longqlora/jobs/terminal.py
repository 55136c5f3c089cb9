"""What the terminal shows of a run: a line when a job starts, the progress of long jobs, why a job failed, and at the end the
files to look at.

Snakemake prints a paragraph per job and nothing of how far a job is. :class:`Terminal` takes the place of its handler for the
terminal, and passes on what is not about the progress of jobs, such as errors and warnings. Snakemake's log file keeps
everything.

This module uses the standard library only: Snakemake imports it at every start.
"""

import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from types import SimpleNamespace

from longqlora.jobs.progress import duration, newest_step
from longqlora.jobs.retries import has_failed_for_good

HIDDEN_EVENTS = {"workflow_started", "resources_info", "job_started", "shellcmd", "progress"}
HIDDEN_MESSAGES = (
    "Building DAG of jobs",
    "Select jobs to execute",
    "Using shell:",
    "Conda environments: ignored",
    "Singularity containers: ignored",
    "Group jobs: inactive",
    "Shutting down",
    "Exiting because a job execution failed",
    "Complete log(s):",
    "Elapsed time:",
    "WorkflowError:\nAt least one job did not complete successfully",
    "SLURM run ID:",
    "MinJobAge ",
    "Submitted array job",
    "Array job submission does not allow for multiple different wildcard combinations",
    "Cleaning up SLURM log files",
)
"""Beginnings of messages of Snakemake that this module replaces or a reader does not need."""
REPEATED_MESSAGES = (
    "No SLURM account given",
    "No account was given",
    "Unable to guess SLURM account",
    "No wall time information given",
    "No job memory information",
)
"""Beginnings of messages that Snakemake's executor for SLURM writes for each job; they are shown once."""
LONG = 10  # seconds after which the end of a job has a line of its own
ENDING = 16384  # bytes at the end of a log that are searched
LAST_LINES = 5  # of a log without a reason that are shown
ERROR = re.compile(r"ERROR error: (.*(?:\n  .*)*)")  # the reason of a failure, in the log of a job
SUBMITTED = re.compile(r"Job \d+ has been submitted with SLURM jobid")
SLURM_STATE = re.compile(r"SLURM-job '(\w+)' failed.* SLURM status is: '(\w+)", re.DOTALL)
SBATCH_ERROR = re.compile(r"SLURM sbatch failed\. The error message was '(.*?)'\.\n", re.DOTALL)
STATES = {
    "CANCELLED": "canceled",
    "NODE_FAIL": "its node failed",
    "OUT_OF_MEMORY": "killed, because it took more memory than it had asked for (mem_mb)",
    "TIMEOUT": "killed, because it took longer than it had asked for (runtime)",
}
"""States of a SLURM job that has failed, as a reason."""


@dataclass
class Job:
    """A job that runs or has failed.

    Attributes:
        number: place in the order of starts.
        title: what it does.
        log: its log file, if it has one.
        started: seconds since the epoch.
        attempt: 1, or more if it failed and was started again.
        due: seconds since the epoch of its next line.
        queued: it has no log yet, so it waits in the queue of a cluster.
        silent: it ends at once, because the attempt before it failed for a reason that remains.
        reason: why it failed.
        cluster_log: log file of the cluster, if the job ran on one and has failed.
    """

    number: int
    title: str
    log: Path | None
    started: float
    attempt: int
    due: float
    queued: bool = False
    silent: bool = False
    reason: str = ""
    cluster_log: Path | None = None

    def seconds(self) -> float:
        return time.time() - self.started


class Terminal(logging.Handler):
    """Shows Snakemake's log records as lines for a reader.

    Args:
        titles: what a job of each rule does, such as ``train {wildcards.system}``; other rules are not shown or counted.
        labels: of the values of each wildcard, where there are any.
        results: returns the files to look at, with what they show.
    """

    def __init__(
        self,
        titles: Mapping[str, str],
        labels: Mapping[str, Mapping[str, str]],
        results: Callable[[], Mapping[str, str]],
        local_copy: Callable[[str], str] = str,
    ):
        super().__init__()
        self.titles, self.labels, self.results, self.local_copy = titles, labels, results, local_copy
        self.default: logging.StreamHandler | None = None
        self.started, self.total, self.done = time.time(), 0, 0
        self.jobs: dict[int, Job] = {}
        self.running: set[int] = set()
        self.failed: dict[int, Job] = {}
        self.exits: dict[int | None, str] = {}  # by thread: how the last job's process ended
        self.interrupted = False  # by Ctrl-C
        self.told: set[str] = set()  # of the messages that are shown once
        self.closed = threading.Event()
        self.shown = {
            "run_info": self.count,
            "job_info": self.start,
            "job_finished": self.finish,
            "job_error": self.fail,
            "error": self.keep_exit,
            None: self.message,
        }

    def replace(self, logger: logging.Logger) -> None:
        """Take the place of Snakemake's handler for the terminal. Nothing changes if a logger plugin has done so already."""
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.name == "DefaultStreamHandler":
                self.default = handler
                logger.removeHandler(handler)
                logger.addHandler(self)
                threading.Thread(target=self.watch, daemon=True).start()
                return

    def close(self) -> None:
        self.closed.set()
        super().close()

    def emit(self, record: logging.LogRecord) -> None:
        event = getattr(record, "event", None)
        try:
            if event in self.shown:
                self.shown[event](record)
            elif event not in HIDDEN_EVENTS:
                self.pass_on(record)
        except Exception:
            self.handleError(record)

    def pass_on(self, record: logging.LogRecord) -> None:
        """Show a record as Snakemake would."""
        text = record.getMessage().strip()
        if text.startswith(HIDDEN_MESSAGES) or SUBMITTED.match(text) or text in self.told:
            return
        if text.startswith(REPEATED_MESSAGES):
            self.told.add(text)
        if self.default:
            self.default.handle(record)

    def write(self, *lines: str) -> None:
        if self.default:
            self.default.stream.write("".join(f"{line}\n" for line in lines))
            self.default.flush()

    def write_job(self, job: Job, words: str = "") -> None:
        self.write(f"[{job.number:{len(str(self.total))}} of {self.total}] {job.title}{words}")

    # --- what Snakemake logs ---

    def count(self, record) -> None:
        self.total = sum(number for rule, number in record.stats.items() if rule in self.titles)
        if self.total:
            self.write(f"{self.total} jobs to run" if self.total > 1 else "1 job to run")

    def start(self, record) -> None:
        if record.rule_name not in self.titles:
            return
        before, now = self.jobs.get(record.jobid), time.time()
        self.jobs[record.jobid] = job = Job(
            number=before.number if before else len(self.jobs) + 1,
            title=self.title(record.rule_name, record.wildcards),
            log=Path(self.local_copy(record.log[0])) if record.log else None,
            started=now,
            attempt=before.attempt + 1 if before else 1,
            due=now + pause(0),
            silent=before is not None and has_failed_for_good(before.log, before.attempt),
        )
        self.failed.pop(record.jobid, None)
        self.running.add(record.jobid)
        if not job.silent:
            self.write_job(job, f": attempt {job.attempt}" if before else "")

    def title(self, rule: str, wildcards: Mapping[str, str]) -> str:
        values = {name: self.labels.get(name, {}).get(value, value) for name, value in wildcards.items()}
        return self.titles[rule].format(wildcards=SimpleNamespace(**values))

    def finish(self, record) -> None:
        if record.job_id in self.running:
            self.running.remove(record.job_id)
            self.done += 1
            job = self.jobs[record.job_id]
            if job.seconds() >= LONG:
                self.write_job(job, f": done in {duration(job.seconds())}")

    def keep_exit(self, record) -> None:
        """Keep how the process of a job ended for :meth:`fail`, which the same thread calls next; show any other error."""
        text = record.getMessage()
        if "CalledProcessError" in text:
            self.exits[record.thread] = text
        else:
            self.pass_on(record)

    def fail(self, record) -> None:
        job = self.jobs.get(record.jobid)
        if job is None:
            return self.pass_on(record)
        self.running.discard(record.jobid)
        job.cluster_log = log_of_cluster([self.local_copy(log) for log in record.log], job.log)
        job.reason = reason_of_failure(job, self.exits.pop(record.thread, ""), record.rule_msg)
        if self.interrupted:
            return self.write_job(job, f": {job.reason.partition('Interrupted: ')[2] or 'interrupted'}")
        self.failed[record.jobid] = job
        if not job.silent:
            self.write_job(job, f": failed after {duration(job.seconds())}: {shorten(job.reason.splitlines()[0], 100)}")

    def message(self, record) -> None:
        text = record.getMessage()
        if text.startswith("Nothing to be done"):
            self.write(*self.results_after("All files are up to date."))
        elif text.startswith("Terminating processes on user request"):
            self.interrupted = True
            self.write("Interrupted: waiting for the running jobs to end.")
        elif not text.startswith("Trying to restart job"):  # the next line says it
            self.pass_on(record)

    # --- long jobs ---

    def watch(self) -> None:
        """Once a second, show how far the long jobs are."""
        while not self.closed.wait(1):
            self.acquire()
            try:
                self.show_progress()
            finally:
                self.release()

    def show_progress(self) -> None:
        """Write a line for each running job that is due for one. The time of a job is counted from its log on."""
        for job in [job for jobid, job in self.jobs.items() if jobid in self.running]:
            was_queued, job.queued = job.queued, job.log is not None and not job.log.exists()
            if was_queued and not job.queued:
                job.started = time.time()
                job.due = job.started + pause(0)
            if time.time() >= job.due and not (job.silent or job.queued):
                job.due = time.time() + pause(job.seconds())
                self.write_job(job, f": {newest_step(ending(job)) or f'running for {duration(job.seconds())}'}")

    # --- the end of the run ---

    def succeeded(self) -> None:
        """Show where the results are."""
        self.write("", *self.results_after(f"Done in {duration(time.time() - self.started)}."))

    def results_after(self, words: str) -> list[str]:
        results = self.results()
        width = max(map(len, results), default=0)
        lines = [f"  {path:{width}}  {shown}" for path, shown in results.items()]
        return [f"{words} Look at", *lines] if lines else [words]

    def stopped(self) -> None:
        """Show how far the run came and, as the last thing, why jobs failed."""
        came = f"Stopped after {duration(time.time() - self.started)}, {self.done} of {self.total} jobs done."
        self.write("", f"{came} The same command continues from there.")
        for job in self.failed.values():
            logs = {"log": job.log, "log of the cluster": job.cluster_log}
            self.write("", f"Failed: {job.title}", *(f"  {name}: {path}" for name, path in logs.items() if path))
            self.write(*(f"  {line}" for line in f"reason: {job.reason}".splitlines()))


def pause(seconds: float) -> float:
    """Seconds until the next line of a job that has run for ``seconds``: a quarter of that, from 15 seconds to 10 minutes."""
    return min(max(15.0, seconds / 4), 600.0)


def ending(job: Job) -> str:
    """The last lines of a job's log, without those of an earlier run."""
    try:
        if job.log is None or job.log.stat().st_mtime < job.started - 1:  # file systems round times
            return ""
        with job.log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - ENDING))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def log_of_cluster(logs: list[str], own: Path | None) -> Path | None:
    """The file with what a cluster has kept of a job's output, if there is one.

    snakemake-executor-plugin-slurm 2.8 names a wrong folder for a job of an array: its log lies one folder higher.

    Args:
        logs: of a job that has failed, as Snakemake names them.
        own: the log that the job writes itself.
    """
    for path in map(Path, logs):
        if path != own:
            higher = path.parent.parent / path.name
            return higher if higher.exists() and not path.exists() else path
    return None


def reason_of_failure(job: Job, exit_text: str, cluster: str | None) -> str:
    """Why a job failed: the error at the end of its log, or else what the cluster or the operating system says.

    Args:
        job: its logs are read.
        exit_text: Snakemake's message of how the job's process ended, or nothing.
        cluster: message of the executor, if it has one.
    """
    text = ending(job)
    found, state = ERROR.findall(text), SLURM_STATE.search(cluster or "")
    stopped = state is not None and state[2] in STATES  # from outside: the job itself knows no more than that
    if found and not stopped:
        return found[-1]
    exit_status = re.search(r"non-zero exit status \d+|died with <Signals\.\w+", exit_text)
    how = exit_status[0].replace("<Signals.", "") if exit_status else "no exit status"
    killed = "SIGKILL" in how or how.endswith(" 137")
    first = f"{'killed, probably because memory ran out' if killed else 'ended without saying why'} ({how})"
    last = found[-1:] or (text or ending(replace(job, log=job.cluster_log))).splitlines()[-LAST_LINES:]
    return "\n".join([reason_of_cluster(cluster) if cluster else first, *last])


def reason_of_cluster(message: str) -> str:
    """Why a job failed that did not say so itself, from the message of Snakemake's executor."""
    if refused := SBATCH_ERROR.search(message):
        return f"SLURM did not take the job: {refused[1]}"
    if found := SLURM_STATE.search(message):
        job, state = found.groups()
        return f"{STATES.get(state, 'ended without saying why')} ({state} in SLURM, job {job})"
    return f"ended without saying why ({message})"
