"""The workflow as a module of another workflow in another folder: from a folder, and from a Git host."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

LOCAL = """
configfile: "config.yaml"

module longqlora:
    snakefile: "{project}/workflow/Snakefile"
    config: config["longqlora"]
    {more}

use rule * from longqlora as longqlora_*

onstart:
    longqlora.onstart()

rule mine:
    input: rules.longqlora_prepare_evaluation_set.output.description.format(dataset="code")
    output: "mine.txt"
    shell: "cp {{input}} {{output}}"
"""
HOSTED = """
configfile: "config/config.yaml"

module longqlora:
    snakefile:
        github("somebody/longqlora", path="workflow/Snakefile", tag="v1")
    config:
        config

use rule * from longqlora
"""  # as snakedeploy writes it
SET = "results/demo/tokens/evaluation/code.json"


def snakemake(folder: Path, *arguments: str, **environment: str) -> str:
    """What a run with this project's Python says, which must succeed. Nothing but the module leads to the package."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "snakemake", "--cores", "1", *arguments]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=own | environment)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


@pytest.fixture(scope="module")
def project(root, tmp_path_factory) -> Path:
    """A copy of what a module needs of the project. Its package leaves a file where it is used by a script."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("workflow", "longqlora"):
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "environment.yml", folder)
    with open(folder / "longqlora/data/evaluation_sets.py", "a", encoding="utf-8") as file:
        file.write('\nimport sys\nprint(f"IMPORTED {__file__} BY {sys.argv[0]}", file=sys.stderr)\n')
    return folder


@pytest.fixture
def user(root, tmp_path) -> Path:
    """The folder of a user, with the demo's data, profile and configuration in it."""
    for name in ("demo", "profiles"):
        shutil.copytree(root / name, tmp_path / name)
    demo = yaml.safe_load((root / "config/config.yaml").read_text(encoding="utf-8"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"longqlora": demo, "mine": 1}), encoding="utf-8")
    return tmp_path


def use(project: Path, user: Path, more: str = "") -> None:
    """Write the user's workflow."""
    (user / "Snakefile").write_text(LOCAL.format(project=project, more=more), encoding="utf-8")


def test_another_workflow_uses_this_one_as_a_module(project, user):
    use(project, user)
    plan = snakemake(user, "-n", "longqlora_all")
    systems = yaml.safe_load((user / "config.yaml").read_text(encoding="utf-8"))["longqlora"]["systems"]
    trained = [name for name, system in systems.items() if "training" in system]
    assert re.search(rf"longqlora_publish_model +{len(trained)}\n", plan)
    output = snakemake(user, "mine")  # in the terminal as the user's workflow wants it
    assert "longqlora_prepare_evaluation_set" in output
    assert "rule mine" in output
    assert f"IMPORTED {project}/longqlora/data/evaluation_sets.py BY" in output
    assert (user / "mine.txt").read_text() == (user / SET).read_text()
    shutil.copytree(project, user / "moved")
    use(user / "moved", user)
    assert "Nothing to be done" in snakemake(user, "-n", "mine")


def test_a_module_with_a_prefix_is_refused(project, user):
    use(project, user, 'prefix: "elsewhere"')
    run = subprocess.run([sys.executable, "-m", "snakemake", "-n"], cwd=user, capture_output=True, text=True)
    assert run.returncode == 1
    assert "cannot have prefix: or replace_prefix:. Its results are in results/demo" in run.stdout + run.stderr


def test_a_module_from_a_git_host_finds_its_package(project, user):
    """The address of the host leads Git to this machine."""
    (user / "config").mkdir()
    demo = yaml.safe_load((user / "config.yaml").read_text(encoding="utf-8"))["longqlora"]
    (user / "config/config.yaml").write_text(yaml.safe_dump(demo), encoding="utf-8")
    (user / "workflow").mkdir()
    (user / "workflow/Snakefile").write_text(HOSTED, encoding="utf-8")
    git = ["git", "-C", str(project), "-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"], ["tag", "v1"]):
        subprocess.run([*git, *command], check=True)
    host = {"GIT_CONFIG_KEY_0": f"url.{project}.insteadOf", "GIT_CONFIG_VALUE_0": "https://github.com/somebody/longqlora"}
    output = snakemake(user, SET, XDG_CACHE_HOME=str(user / "cache"), GIT_CONFIG_COUNT="1", **host)
    assert f"IMPORTED {user}/cache/" in output
    assert (user / SET).is_file()
