"""The workflow as a user runs it: a copy of the project, one small run, then what an edit would run again."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas
import pytest
import yaml

PROJECT = ["Snakefile", "workflow", "config", "longqlora", "profiles", "environment.yml"]
TARGETS = {"all", "data", "train", "evaluate", "answers", "ablations", "perplexity_report"}
PERPLEXITY_REPORTS = {"render_table": 1, "plot_perplexity": 1, "plot_loss_by_position": 1}
REPORTS = {**PERPLEXITY_REPORTS, "report_retrieval": 1}
EVALUATION = {"evaluate_perplexity", "evaluate_retrieval", *REPORTS}
TRAINING = {"train_adapter", "train_model", "merge_adapter"}
SHOWN = {"plot_loss", "answer_held_out"}


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
    """The demo with every size cut to seconds: the base, an adapter, all weights and a chat model; two lengths, one set."""
    demo = config["demo"]
    demo["pretraining"].update(steps=4, tokens_per_step=512)
    demo["architecture"].update(hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    demo.update(evaluation_characters=4000, vocab_size=512)
    config["corpus"].update(num_texts=50)
    config["sft"].update(num_records=20, max_tokens=1024, held_out=2)
    config["training"].update(steps=2, rank=4, logging_steps=1)
    config["systems"] = {name: config["systems"][name] for name in ("base", "longqlora", "longlora-full", "chat")}
    config["systems"]["chat"]["context_length"] = 1024
    config["training"].update(batch_size=2)
    config["evaluation"]["lengths"] = [64, 256]
    del config["evaluation"]["datasets"]["code"]
    config["retrieval"] = {"tasks": ["induction"], "depths": [0, 1], "samples": 2}
    config["ablations"] = {
        "rank": {"system": "longqlora", "grid": {"rank": [4, 8]}},
        "attention": {"system": "longqlora", "grid": {"evaluation_attention": ["full", "shifted_sparse"]}},
    }
    return config


def edit(path: Path, change) -> None:
    config = yaml.safe_load(path.read_text())
    change(config)
    path.write_text(yaml.safe_dump(config))


def copy_project(root: Path, folder: Path) -> Path:
    """A copy of the project with the demo cut to seconds."""
    for name in PROJECT:
        copy = shutil.copytree if (root / name).is_dir() else shutil.copy
        copy(root / name, folder / name)
    edit(folder / "config/config.yaml", shrink)
    return folder


@pytest.fixture(scope="module")
def project(root, tmp_path_factory) -> Path:
    """A copy of the project on which the whole workflow has run once."""
    folder = copy_project(root, tmp_path_factory.mktemp("project"))
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
        (system, length) for system in ("base", "chat", "longlora-full", "longqlora") for length in (64, 256)
    ]
    assert (cells["num_scored"] == cells["num_tokens"] - cells["num_documents"]).all()
    assert cells["perplexity"].between(1, 512 * 2).all()
    assert cells["retrieval_accuracy"].between(0, 1).all()
    assert len(pandas.read_csv(results / "tables/differences.csv")) == 6 * 2  # pairs of systems, lengths
    assert len(pandas.read_csv(results / "tables/retrieval.csv")) == 4 * 2 * 2  # systems, lengths, depths
    for name in (
        "tables/perplexity.md", "tables/perplexity.tex", "plots/perplexity.png", "plots/perplexity.svg",
        "tables/loss_by_position.csv", "plots/loss_by_position.png", "plots/loss_by_position.svg",
        "tables/retrieval.md", "plots/retrieval.png", "plots/retrieval.svg",
    ):  # fmt: skip
        assert (results / name).stat().st_size > 100
    for system, context in [("longqlora", 256), ("longlora-full", 256), ("chat", 1024)]:
        model = json.loads((results / f"models/{system}/config.json").read_text())
        assert model["max_position_embeddings"] == context
        assert model["rope_parameters"]["factor"] == context / 128
        assert (results / f"models/{system}/README.md").read_text().startswith("---\nlibrary_name: transformers")
        assert "step 2 of 2: loss" in (results / f"logs/train/{system}.log").read_text()
        assert json.loads((results / f"training/{system}.json").read_text())["steps"] == 2
        assert list((results / f"tensorboard/{system}").glob("events.out.tfevents.*"))
    assert (results / "adapters/longqlora/adapter_model.safetensors").exists()
    assert not (results / "adapters/longlora-full").exists()
    certificate = json.loads((results / "models/longqlora/merge_certificate.json").read_text())
    assert len(certificate["models"]) == 4
    assert certificate["published"] in certificate["models"]


def test_the_chat_model_answers_what_it_was_not_trained_on(project):
    results = project / "results/demo"
    answers = json.loads((results / "answers/chat.json").read_text())
    assert len(answers) == 2
    assert all(row["reference"] and row["messages"][-1]["role"] == "user" for row in answers)
    assert "20 records" not in (results / "logs/tokenize_sft.log").read_text()
    assert "18 records" in (results / "logs/tokenize_sft.log").read_text()
    assert (results / "answers/chat.md").read_text().count("**Reference**") == 2


def test_the_run_leaves_its_data_and_how_it_was_drawn(project):
    results = project / "results/demo"
    assert json.loads((results / "corpus/sample.json").read_text())["total"]["sampled"] == 50
    assert json.loads((results / "sft/records.json").read_text())["records"] == 20
    for name in (
        "tokens/corpus.bin",
        "tokens/sft.arrow",
        "plots/text_lengths.png",
        "plots/sft_shares.svg",
        "corpus/removed.csv",
        "tables/loss.csv",
        "plots/loss.png",
        "plots/loss.svg",
    ):
        assert (results / name).stat().st_size > 50


def test_nothing_is_left_to_do(project):
    assert planned(project) == {}


def test_an_edit_of_the_perplexity_module_reruns_evaluation_and_what_shows_it(project, module):
    module("longqlora/perplexity.py")  # the certificates of the merges are measured by it as well
    assert planned(project) == {
        "merge_adapter": 2, "answer_held_out": 1, "evaluate_perplexity": 8, "evaluate_retrieval": 8, **REPORTS,
    }  # fmt: skip


def test_an_edit_of_the_needles_reruns_retrieval_and_what_shows_it(project, module):
    module("longqlora/needles.py")
    assert planned(project) == {"evaluate_retrieval": 8, "render_table": 1, "report_retrieval": 1}


def test_an_edit_of_the_plot_module_reruns_the_plots(project, module):
    module("longqlora/plots.py")
    assert planned(project) == {"plot_perplexity": 1, "plot_loss_by_position": 1, "report_retrieval": 1}


def test_an_edit_of_the_attention_module_retrains(project, module):
    module("longqlora/attention.py")
    assert set(planned(project)) >= TRAINING
    assert set(planned(project)) <= TRAINING | EVALUATION | SHOWN


def test_a_new_length_computes_the_new_cells_only(project, config_file):
    edit(config_file, lambda config: config["evaluation"].update(lengths=[64, 128, 256]))
    assert planned(project) == {"evaluate_perplexity": 4, "evaluate_retrieval": 4, **REPORTS}


def test_another_protocol_measures_perplexity_anew_and_nothing_else(project, config_file):
    edit(config_file, lambda config: config["evaluation"].update(protocol="longqlora"))
    assert planned(project) == {"evaluate_perplexity": 8, **PERPLEXITY_REPORTS}


def test_an_ablation_is_made_by_its_target_from_weights_that_are_there(project):
    """The row's rank is 4: its adapter is on the base in both grids, and rank 8 alone is trained."""
    assert planned(project, "ablations") == {"train_adapter": 1, "evaluate_perplexity": 6, "report_ablation": 2}
    table = "results/demo/tables/ablations/attention.csv"
    run = snakemake(project, table)
    assert run.returncode == 0, run.stdout + run.stderr
    cells = pandas.read_csv(project / table)
    assert cells["attention"].tolist() == cells["evaluation_attention"].tolist() == ["full"] * 2 + ["shifted_sparse"] * 2
    assert (cells["weights"] == "adapter on the base").all()
    full, sparse = cells[cells["context_length"] == 256]["perplexity"]
    assert full != sparse
    assert (project / "results/demo/plots/ablations/attention.svg").exists()


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
        "train_adapter": 1, "merge_adapter": 1, "plot_loss": 1, "evaluate_perplexity": 2, "evaluate_retrieval": 2, **REPORTS,
    }  # fmt: skip


def test_another_rope_scaling_retrains_that_system_only(project, config_file):
    edit(config_file, lambda config: config["systems"]["longlora-full"].update(rope_scaling="yarn"))
    assert planned(project) == {
        "train_model": 1, "plot_loss": 1, "evaluate_perplexity": 2, "evaluate_retrieval": 2, **REPORTS,
    }  # fmt: skip


def test_a_published_model_is_a_row_of_its_own_with_its_own_tokenizer(project, config_file):
    published = {"label": "published", "model": "owner/model"}
    edit(config_file, lambda config: config["systems"].update(published=published))
    assert planned(project) == {
        "retokenize_evaluation_set": 1, "evaluate_perplexity": 2, "evaluate_retrieval": 2, **REPORTS,
    }  # fmt: skip


def test_a_system_that_the_base_cannot_be_trained_to_is_refused_before_any_job(project, config_file):
    edit(config_file, lambda config: config["systems"]["longqlora"].update(context_length=64, training={"rank": 500}))
    run = snakemake(project, "-n")
    output = run.stdout + run.stderr
    assert run.returncode != 0
    assert "context_length 64 is below the model's own context of 128 tokens" in output
    assert "rank 500 is above the model's width, hidden_size 32" in output


def test_targets_run_their_part_alone(project, module, config_file):
    edit(config_file, lambda config: config["systems"]["longqlora"]["training"].update(rank=8))
    module("longqlora/plots.py")
    assert planned(project, "data") == {}
    assert planned(project, "train") == {"train_adapter": 1, "merge_adapter": 1}
    assert set(planned(project, "evaluate")) == {"train_adapter", "merge_adapter", "evaluate_perplexity", "evaluate_retrieval"}
    assert set(planned(project, "perplexity_report")) == {"train_adapter", "merge_adapter"} | EVALUATION


@pytest.mark.parametrize("name", ["llama2-7b-8k", "llama2-7b-12k", "llama2-13b-8k", "vicuna-13b-8k", "vicuna-13b-8k-mixture"])
def test_the_papers_runs_are_planned_without_network_gpu_or_models(root, name):
    run = snakemake(root, "-n", "--configfile", f"config/{name}.yaml")
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"train_adapter +[12]", run.stdout)


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


def run_and_kill(folder: Path, target: str, checkpoints: Path, moment: float) -> None:
    """Start the workflow, and kill it with all its jobs ``moment`` seconds after it has written a new checkpoint."""
    command = [sys.executable, "-m", "snakemake", "--cores", "2", target]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    before, silent = set(checkpoints.glob("checkpoint-*")), subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=folder, stdout=silent, stderr=silent, env=environment, start_new_session=True)
    while process.poll() is None and set(checkpoints.glob("checkpoint-*")) <= before:
        time.sleep(0.02)
    time.sleep(moment)
    assert process.poll() is None, "it was over before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert snakemake(folder, "--unlock").returncode == 0


def test_a_workflow_that_is_killed_twice_ends_in_the_very_same_adapter(root, tmp_path):
    folder, target = copy_project(root, tmp_path), "results/demo/adapters/longqlora"
    edit(folder / "config/config.yaml", lambda config: config["training"].update(steps=300, checkpoint_steps=25))
    checkpoints = folder / "results/demo/checkpoints/longqlora"
    for _ in range(2):
        run_and_kill(folder, target, checkpoints, moment=random.uniform(0, 1))
        assert not (folder / target / "adapter_model.safetensors").exists()

    def finish() -> tuple[bytes, dict]:
        run = snakemake(folder, target)
        assert run.returncode == 0, run.stdout + run.stderr
        card = json.loads((folder / "results/demo/training/longqlora.json").read_text())
        return (folder / target / "adapter_model.safetensors").read_bytes(), card

    adapter, card = finish()
    assert card["resumed_from_step"] >= 50
    shutil.rmtree(folder / target)
    expected, uninterrupted = finish()
    assert uninterrupted["resumed_from_step"] == 0
    assert adapter == expected
    assert card["trace"] == uninterrupted["trace"]
