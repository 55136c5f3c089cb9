"""A bucket of a local S3 server: the results of the workflow, and the checkpoints of a training."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_workflow import copy_project, edit, environment, snakemake

NEEDED = ("moto", "flask_cors", "boto3", "s3fs", "snakemake_storage_plugin_s3")
pytestmark = [
    pytest.mark.workflow,
    pytest.mark.skipif(not all(map(find_spec, NEEDED)), reason='needs a local S3 server: pip install -e ".[test,s3,s3-test]"'),
]
STORAGE = ("--default-storage-provider", "s3", "--default-storage-prefix", "s3://bucket/run")
TEXTS = "results/demo/tokens/corpus.bin"


@pytest.fixture(scope="module")
def endpoint():
    """A server that this process and those that it starts use as S3; it has the bucket ``bucket``."""
    import boto3

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "ENDPOINT_URL": address,
            "ACCESS_KEY_ID": "x",
            "SECRET_ACCESS_KEY": "x",
            "DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(f"AWS_{name}", value)
        deadline = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)) and time.monotonic() < deadline:
            time.sleep(0.1)
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield
    process.kill()
    process.wait()


@pytest.fixture
def machine(root, tmp_path):
    """A function that makes a working folder of its own, with the small demo, in which a few keys have other values."""

    def make(name: str, change=lambda config: None) -> Path:
        (tmp_path / name).mkdir()
        folder = copy_project(root, tmp_path / name)
        edit(folder / "config/config.yaml", smaller)
        edit(folder / "config/config.yaml", change)
        return folder

    return make


def smaller(config: dict) -> None:
    """The shipped base in place of one that is trained, and one adapter."""
    del config["pretraining"], config["ablations"], config["sft"]
    config["base_model"] = {"path": "demo/model"}
    config["systems"] = {name: config["systems"][name] for name in ("base", "longqlora")}


def in_bucket(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run Snakemake with its results in the bucket."""
    run = snakemake(folder, *STORAGE, *arguments)
    assert run.returncode == 0, run.stdout + run.stderr
    return run


@pytest.mark.usefixtures("endpoint")
def test_another_machine_finds_the_results_in_the_bucket(machine):
    in_bucket(machine("first"), TEXTS)
    other = machine("other")
    assert "Nothing to be done" in in_bucket(other, "-n", TEXTS).stdout
    rest = in_bucket(other, "-n")
    assert not re.search(r"^(sample_corpus|tokenize_corpus) ", rest.stdout + rest.stderr, re.MULTILINE)
    assert re.search(r"^train_adapter +1$", rest.stdout + rest.stderr, re.MULTILINE)


@pytest.mark.usefixtures("endpoint")
def test_the_models_and_records_of_a_run_are_in_the_bucket(machine):
    """An adapter that one job makes and another one evaluates, both by its path."""
    import boto3

    record = "results/demo/perplexity/longqlora/prose/256.json"
    folder = machine("first")
    in_bucket(folder, record)
    found = boto3.client("s3").list_objects_v2(Bucket="bucket")["Contents"]
    names = {item["Key"].removeprefix("run/") for item in found}
    assert {record, "results/demo/adapters/longqlora/adapter_model.safetensors", TEXTS} <= names
    assert not (folder / record).exists()  # Snakemake removes its local copies
    card = boto3.client("s3").get_object(Bucket="bucket", Key="run/results/demo/training/longqlora.json")["Body"].read()
    assert TEXTS in json.loads(card)["data"]["path"]  # as without a bucket, so that the run is the same


@pytest.mark.usefixtures("endpoint")
def test_results_that_the_bucket_lacks_are_not_removed(machine):
    folder = machine("local")
    (folder / "results/demo").mkdir(parents=True)
    run = snakemake(folder, *STORAGE, TEXTS)
    assert run.returncode == 1
    assert "results/demo is not in s3://bucket/run yet" in run.stdout + run.stderr
    assert (folder / "results/demo").exists()


@pytest.mark.usefixtures("endpoint")
def test_a_job_that_fails_says_why_and_is_shown_once(machine):
    folder = machine("broken")
    (folder / "demo/texts/prose.jsonl.xz").write_bytes(b"no archive")
    run = snakemake(folder, *STORAGE[:-1], "s3://bucket/broken", "results/demo/tokens/evaluation/prose.bin")
    lines = run.stdout + run.stderr
    assert run.returncode == 1
    assert "reason: demo/texts/prose.jsonl.xz: the file is damaged" in lines
    assert "attempt 2" not in lines


@pytest.mark.usefixtures("endpoint")
def test_a_training_whose_machine_is_lost_goes_on_elsewhere(machine):
    import s3fs

    def long(config):
        config["training"].update(steps=60, checkpoint_steps=5, checkpoint_store="s3://bucket/checkpoints")

    adapter, files = "results/demo/adapters/longqlora", s3fs.S3FileSystem(use_listings_cache=False)
    folder = machine("lost", long)
    command = [sys.executable, "-m", "snakemake", "--cores", "1", adapter]
    process = subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while not files.glob("bucket/checkpoints/longqlora-*/checkpoint-10/files.json") and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, 9)
    process.wait()
    shutil.rmtree(folder)
    folder = machine("elsewhere", long)
    run = snakemake(folder, adapter)
    assert run.returncode == 0, run.stdout + run.stderr
    log = (folder / "results/demo/logs/train/longqlora.log").read_text()
    assert re.search(r"resuming from .*checkpoint-[1-5][05]", log)
    assert not files.find("bucket/checkpoints")
