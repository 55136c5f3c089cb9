"""profiles/slurm in a SLURM on this machine: its jobs run there, trainings that are canceled or preempted go on, and a job that
fails shows its logs."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from test_workflow import copy_project, edit, environment, snakemake

pytestmark = pytest.mark.cluster
START = Path(__file__).with_name("start_slurm")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
CLUSTER = [
    "--workflow-profile", "profiles/slurm",
    "--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "3",  # there is no accounting, for sacct
]  # fmt: skip
SYSTEMS = ("canceled", "preempted")
ADAPTERS = [f"results/demo/adapters/{system}" for system in SYSTEMS]


def reason_to_skip() -> str | None:
    """Why this machine cannot run a SLURM for tests, and what to do about it."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if any(shutil.which(program, path=path) is None for program in PROGRAMS):
        return "needs SLURM: apt-get install slurmctld slurmd slurm-client munge"
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        return 'needs the extra slurm: pip install -e ".[test,slurm]" -c constraints.txt'
    return None if os.geteuid() == 0 else "needs root, to start the daemons of SLURM"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[None]:
    """Two nodes, n1 and n2, with a CPU and a GPU each."""
    if reason := reason_to_skip():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    with open(folder / "start.log", "wb") as log:  # not a pipe, which the daemons would keep open
        started = subprocess.run([START, folder], stdout=log, stderr=log)
    assert started.returncode == 0, (folder / "start.log").read_text()
    yield
    subprocess.run([START, "--stop"], check=True)


class SlurmJob(NamedTuple):
    """What squeue says of a job. ``rule``: with its wildcards, as Snakemake has it in the job's comment."""

    number: str
    state: str
    node: str
    rule: str


def slurm_jobs() -> list[SlurmJob]:
    command = ["squeue", "--states=all", "--noheader", "--array", "--format=%i|%T|%N|%k"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [SlurmJob(*line.split("|")) for line in lines]


def details(job: SlurmJob) -> str:
    return subprocess.run(["scontrol", "show", "job", job.number], capture_output=True, text=True, check=True).stdout


def wait_until(found: Callable[[], bool], process: subprocess.Popen, seconds: float) -> None:
    """Wait until something is found, as long as the process runs."""
    end = time.monotonic() + seconds
    while not found():
        assert process.poll() is None, "the workflow has ended before that"
        assert time.monotonic() < end, f"not within {seconds} s; SLURM has {slurm_jobs()}"
        time.sleep(0.1)


def running_training(folder: Path, system: str, process: subprocess.Popen) -> SlurmJob:
    """The job that trains a system, when it has written a checkpoint."""
    checkpoints = folder / f"results/demo/checkpoints/{system}"
    wait_until(lambda: any(checkpoints.glob("checkpoint-*")), process, 300)
    (job,) = [job for job in slurm_jobs() if job.rule.endswith(system) and job.state == "RUNNING"]
    return job


def two_trainings(config: dict) -> None:
    config["base_model"] = {"path": "demo/model"}
    for section in ("pretraining", "sft", "ablations", "retrieval"):
        del config[section]
    trained = config["systems"]["longqlora"]
    config["systems"] = {"base": config["systems"]["base"], **{name: {**trained, "label": name} for name in SYSTEMS}}
    config["systems"]["preempted"]["training"] = {"rank": 8}
    config["training"].update(steps=200, checkpoint_steps=10)


@pytest.fixture(scope="module")
def project(root, tmp_path_factory) -> Path:
    folder = copy_project(root, tmp_path_factory.mktemp("project"))
    edit(folder / "config/config.yaml", two_trainings)
    return folder


def test_a_canceled_and_a_preempted_training_go_on_and_end_in_the_same_bits(slurm, project):
    cells = [f"results/demo/perplexity/base/prose/{length}.json" for length in (64, 256)]
    arrays = ["--jobs", "unlimited", "--slurm-array-jobs", "sample_shard, evaluate_perplexity"]
    resources = ["train_adapter:gpu=1", "evaluate_perplexity:mem_mb=2000", "evaluate_perplexity:runtime=10"]
    targets = ["results/demo/plan.json", *ADAPTERS, *cells]
    command = [sys.executable, "-m", "snakemake", *targets, *CLUSTER, *arrays, "--set-resources", *resources]
    with open(project / "terminal.txt", "wb") as terminal:
        process = subprocess.Popen(command, cwd=project, stdout=terminal, stderr=terminal, env=environment())
    try:
        canceled = running_training(project, "canceled", process)
        subprocess.run(["scancel", canceled.number], check=True)
        preempted = running_training(project, "preempted", process)
        urgent = ["sbatch", "--partition=urgent", f"--nodelist={preempted.node}", "--output=/dev/null", "--wrap=sleep 1"]
        subprocess.run(urgent, check=True)
        code = process.wait(timeout=400)
    finally:
        process.kill()
    lines = (project / "terminal.txt").read_text()
    assert code == 0, lines
    check_jobs(canceled, preempted)
    assert re.search(r"train canceled: failed after .*: canceled \(CANCELLED in SLURM, job \d+\)", lines)
    assert "train canceled: attempt 2" in lines
    assert "train preempted: attempt" not in lines
    assert all(json.loads((project / cell).read_text())["perplexity"] > 1 for cell in cells)

    interrupted = {path: (project / path / "adapter_model.safetensors").read_bytes() for path in ADAPTERS}
    assert all(card["resumed_from_step"] >= 10 for card in cards(project))
    for path in ADAPTERS:
        shutil.rmtree(project / path)
    run = snakemake(project, *ADAPTERS)  # on this machine, without SLURM
    assert run.returncode == 0, run.stdout + run.stderr
    assert all(card["resumed_from_step"] == 0 for card in cards(project))
    assert {path: (project / path / "adapter_model.safetensors").read_bytes() for path in ADAPTERS} == interrupted


def cards(project: Path) -> list[dict]:
    return [json.loads((project / f"results/demo/training/{system}.json").read_text()) for system in SYSTEMS]


def check_jobs(canceled: SlurmJob, preempted: SlurmJob) -> None:
    """Each job of the workflow has run in SLURM, with what it asks for, and the two trainings as they should."""
    jobs = slurm_jobs()
    states = {job.number: job.state for job in jobs}
    assert {job.node for job in jobs} == {"n1", "n2"}
    assert states.pop(canceled.number) == "CANCELLED"
    assert set(states.values()) == {"COMPLETED"}
    rules = {re.split("_wildcards_", job.rule)[0].removeprefix("rule_") for job in jobs}
    assert rules >= {
        "prepare_evaluation_set", "index_evaluation_sets", "sample_shard", "sample_corpus", "tokenize_corpus", "train_adapter",
        "evaluate_perplexity",
    }  # fmt: skip
    for rule in ("sample_shard", "evaluate_perplexity"):
        assert sum("_" in job.number and rule in job.rule for job in jobs) == 2, f"{rule}: no array"
    assert "Restarts=1" in details(preempted)
    assert "TresPerJob=gres:gpu:1" in details(preempted)
    assert "TimeLimit=UNLIMITED" not in details(preempted)  # but that of the plan
    assert re.search(r"MinMemoryNode=[1-9]\d*M", details(preempted))


def test_a_job_that_fails_shows_its_log_and_that_of_slurm(slurm, project):
    (project / "demo/texts/prose.jsonl.xz").write_bytes(b"no archive")
    target = "results/demo/tokens/evaluation/prose.bin"
    command = [sys.executable, "-m", "snakemake", target, "--forcerun", "prepare_evaluation_set", *CLUSTER]
    run = subprocess.run(command, cwd=project, capture_output=True, text=True, env=environment())
    lines = run.stdout + run.stderr
    assert run.returncode == 1, lines
    failed = re.search(r"Failed: prepare the evaluation set .+\n  log: (.+)\n  log of the cluster: (.+)\n  reason: (.+)", lines)
    assert failed, lines
    log, cluster_log, reason = failed.groups()
    assert reason.startswith("demo/texts/prose.jsonl.xz: the file is damaged")
    assert (project / log).exists()
    assert "rule prepare_evaluation_set" in Path(cluster_log).read_text()
