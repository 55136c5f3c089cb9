"""The workflow as a user runs it: a copy of the project, one small run, then what an edit would run again."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import yaml

PROJECT = ["Snakefile", "workflow", "config", "longqlora", "profiles", "environment.yml"]
TARGETS = {"all", "data", "train", "evaluate", "perplexity_report"}
EVALUATION = {"evaluate_perplexity", "render_table", "plot_perplexity"}


def snakemake(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "snakemake", "--cores", "2", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def planned(folder: Path, *arguments: str) -> dict[str, int]:
    """Rule → number of jobs of a dry run, the targets left out."""
    run = snakemake(folder, "-n", *arguments)
    assert run.returncode == 0, run.stdout + run.stderr
    stats = re.search(r"Job stats:\n(?:.*\n){2}((?:\S+ +\d+\n)+)", run.stdout + run.stderr)
    jobs = dict(line.split() for line in stats[1].splitlines()) if stats else {}
    return {rule: int(number) for rule, number in jobs.items() if rule not in TARGETS | {"total"}}


def shrink(config: dict) -> dict:
    """The demo with every size cut to seconds: two systems, one of them trained, two lengths, one evaluation set."""
    demo = config["demo"]
    demo["pretraining"].update(steps=4, tokens_per_step=512)
    demo["architecture"].update(hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    demo.update(evaluation_characters=4000, vocab_size=512)
    config["corpus"].update(num_texts=50)
    config["sft"].update(num_records=20, max_tokens=1024)
    config["training"].update(steps=2, rank=4, logging_steps=1)
    config["systems"] = {name: config["systems"][name] for name in ("base", "longqlora")}
    config["systems"]["longqlora"]["training"]["batch_size"] = 2
    config["evaluation"]["lengths"] = [32, 256]
    del config["evaluation"]["datasets"]["code"]
    return config


def edit(path: Path, change) -> None:
    config = yaml.safe_load(path.read_text())
    change(config)
    path.write_text(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def project(root, tmp_path_factory) -> Path:
    """A copy of the project on which the whole workflow has run once."""
    folder = tmp_path_factory.mktemp("project")
    for name in PROJECT:
        copy = shutil.copytree if (root / name).is_dir() else shutil.copy
        copy(root / name, folder / name)
    edit(folder / "config/config.yaml", shrink)
    run = snakemake(folder)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


@pytest.fixture
def config_file(project):
    """The configuration, put back after the test."""
    path = project / "config/config.yaml"
    before = path.read_text()
    yield path
    path.write_text(before)


@pytest.fixture
def module(project):
    """Append a line to a file of the project; taken back after the test."""
    edited = {}

    def append(name: str) -> None:
        path = project / name
        edited[path] = path.read_text(), path.stat().st_mtime_ns
        path.write_text(edited[path][0] + "\n# edited\n")

    yield append
    for path, (text, modified) in edited.items():
        path.write_text(text)
        os.utime(path, ns=(modified, modified))


def test_the_run_leaves_tables_plots_models_and_records(project):
    results = project / "results/demo"
    cells = pandas.read_csv(results / "tables/perplexity.csv")
    assert sorted(zip(cells["system"], cells["context_length"], strict=True)) == [
        ("base", 32), ("base", 256), ("longqlora", 32), ("longqlora", 256),
    ]  # fmt: skip
    assert (cells["num_scored"] == cells["num_tokens"] - 1).all()
    assert cells["perplexity"].between(1, 512 * 2).all()
    for name in ("tables/perplexity.md", "tables/perplexity.tex", "plots/perplexity.png", "plots/perplexity.svg"):
        assert (results / name).stat().st_size > 100
    merged = json.loads((results / "models/longqlora/config.json").read_text())
    assert merged["max_position_embeddings"] == 256
    assert merged["rope_parameters"]["factor"] == 2
    assert "step 2 of 2: loss" in (results / "logs/train_adapter/longqlora.log").read_text()
    assert json.loads((results / "corpus/sample.json").read_text())["total"]["sampled"] == 50
    assert json.loads((results / "sft/records.json").read_text())["records"] == 20
    for name in (
        "tokens/corpus.bin",
        "tokens/sft.arrow",
        "plots/text_lengths.png",
        "plots/sft_shares.svg",
        "corpus/removed.csv",
    ):
        assert (results / name).stat().st_size > 50


def test_nothing_is_left_to_do(project):
    assert planned(project) == {}


def test_an_edit_of_the_perplexity_module_reruns_evaluation_and_what_shows_it(project, module):
    module("longqlora/perplexity.py")
    assert planned(project) == {"evaluate_perplexity": 4, "render_table": 1, "plot_perplexity": 1}


def test_an_edit_of_the_plot_module_reruns_the_plot(project, module):
    module("longqlora/plots.py")
    assert planned(project) == {"plot_perplexity": 1}


def test_an_edit_of_the_attention_module_retrains(project, module):
    module("longqlora/attention.py")
    assert {"train_adapter", "merge_adapter"} <= set(planned(project)) <= {"train_adapter", "merge_adapter"} | EVALUATION


def test_a_new_length_computes_the_new_cells_only(project, config_file):
    edit(config_file, lambda config: config["evaluation"].update(lengths=[32, 64, 256]))
    assert planned(project) == {"evaluate_perplexity": 2, "render_table": 1, "plot_perplexity": 1}


def test_an_edit_of_the_contamination_module_makes_the_data_anew(project, module):
    module("longqlora/contamination.py")
    assert {"index_evaluation_sets", "sample_shard", "sample_corpus", "build_sft_set"} <= set(planned(project))


def test_what_only_the_join_uses_joins_the_shards_anew_and_reads_none(project, config_file):
    edit(config_file, lambda config: config["corpus"].update(allow_fewer=True))
    jobs = planned(project, "data")
    assert jobs == {"sample_corpus": 1, "plot_text_lengths": 1, "tokenize_corpus": 1}


def test_a_further_file_is_read_alone(project, config_file):
    shutil.copy(project / "results/demo/sources/corpus/shard-0.jsonl.gz", project / "more.jsonl.gz")
    edit(config_file, lambda config: config["corpus"]["sources"][0]["paths"].append("more.jsonl.gz"))
    assert planned(project, "data") == {"sample_shard": 1, "sample_corpus": 1, "plot_text_lengths": 1, "tokenize_corpus": 1}


def test_a_damaged_shard_stops_the_run_and_names_the_file(project, tmp_path):
    folder = shutil.copytree(project, tmp_path / "project")
    whole = (folder / "results/demo/sources/corpus/shard-0.jsonl.gz").read_bytes()
    (folder / "torn.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    source = {"paths": ["torn.jsonl.gz"]}
    edit(folder / "config/config.yaml", lambda config: config["corpus"]["sources"].append(source))
    run = snakemake(folder, "results/demo/corpus/sample.parquet")
    output = run.stdout + run.stderr
    assert run.returncode != 0
    assert "torn.jsonl.gz: the file is damaged, breaks off or cannot be read (Compressed file ended" in output


def test_a_changed_rank_retrains_that_system_only(project, config_file):
    edit(config_file, lambda config: config["systems"]["longqlora"]["training"].update(rank=8))
    assert planned(project) == {
        "train_adapter": 1, "merge_adapter": 1, "evaluate_perplexity": 2, "render_table": 1, "plot_perplexity": 1,
    }  # fmt: skip


def test_targets_run_their_part_alone(project, module, config_file):
    edit(config_file, lambda config: config["systems"]["longqlora"]["training"].update(rank=8))
    module("longqlora/plots.py")
    assert planned(project, "data") == {}
    assert planned(project, "train") == {"train_adapter": 1, "merge_adapter": 1}
    assert set(planned(project, "evaluate")) == {"train_adapter", "merge_adapter", "evaluate_perplexity"}
    assert set(planned(project, "perplexity_report")) == {"train_adapter", "merge_adapter"} | EVALUATION


@pytest.mark.parametrize("name", ["llama2-7b-8k", "llama2-7b-12k", "llama2-13b-8k", "vicuna-13b-8k", "vicuna-13b-8k-mixture"])
def test_the_papers_runs_are_planned_without_network_gpu_or_models(root, name):
    run = snakemake(root, "-n", "--configfile", f"config/{name}.yaml")
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"train_adapter +1", run.stdout)


def test_a_wrong_config_fails_before_any_job_with_a_short_message(project, config_file):
    edit(config_file, lambda config: config["training"].update(rnk=8))
    run = snakemake(project)
    output = run.stdout + run.stderr
    assert run.returncode != 0
    assert "training: unknown key 'rnk'; did you mean 'rank'?" in output
    assert "Traceback" not in output
    assert len(output.splitlines()) < 12


def test_a_job_that_fails_names_its_log_and_the_reason(project, tmp_path):
    folder = shutil.copytree(project, tmp_path / "project")  # the failed job takes its former output along
    edit(folder / "config/config.yaml", lambda config: config["corpus"].update(num_texts=10**6))
    run = snakemake(folder, "results/demo/corpus/sample.parquet")
    output = run.stdout + run.stderr
    assert run.returncode != 0
    assert "corpus.num_texts asks for 1000000 texts" in output
    assert "results/demo/logs/sample_corpus.log" in output
    assert "Traceback" in (folder / "results/demo/logs/sample_corpus.log").read_text()


def test_an_edit_of_a_script_reruns_its_rule(project, module):
    module("workflow/scripts/render_table.py")
    assert planned(project) == {"render_table": 1}


def test_touching_code_and_config_reruns_nothing(project):
    for path in [*project.glob("longqlora/*.py"), *project.glob("workflow/**/*.*"), project / "config/config.yaml"]:
        path.touch()
    assert planned(project) == {}
