"""The workflow as a user runs it: a copy of the project, one small run, then what an edit would run again."""

import json
import lzma
import os
import pstats
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pandas
import psutil
import pytest
import yaml

PROJECT = ["Snakefile", "workflow", "config", "demo", "longqlora", "profiles", "environment.yml"]
TARGETS = {"all", "data", "train", "evaluate", "answers", "ablations", "perplexity_report"}
PLAN = {"plan_run"}  # made again after most changes of the configuration, and a reason for no other job
PERPLEXITY_REPORTS = {"render_table": 1, "plot_perplexity": 1, "plot_loss_by_position": 1}
REPORTS = {**PERPLEXITY_REPORTS, "report_retrieval": 1}
REPORT = {"render_report": 1}
ANSWERS = {"evaluate_answers": 1, "report_answers": 1}
EVALUATION = {"evaluate_perplexity", "evaluate_retrieval", *REPORTS}
TRAINING = {"train_adapter", "train_model", "merge_adapter", "publish_model"}
SHOWN = {"plot_loss", "evaluate_answers", "report_answers"}


def environment() -> dict[str, str]:
    """This process's environment without PYTHONPATH, from which another package would be imported than the copy's."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}


def snakemake(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "snakemake", "--cores", "2", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment())


def planned(folder: Path, *arguments: str) -> dict[str, int]:
    """Rule → number of jobs of a dry run, without targets and plan, and without the report where it follows other jobs."""
    run = snakemake(folder, "-n", *arguments)
    assert run.returncode == 0, run.stdout + run.stderr
    stats = re.search(r"Job stats:\n(?:.*\n){2}((?:\S+ +\d+\n)+)", run.stdout + run.stderr)
    jobs = dict(line.split() for line in stats[1].splitlines()) if stats else {}
    jobs = {rule: int(number) for rule, number in jobs.items() if rule not in TARGETS | PLAN | {"total"}}
    return jobs if jobs == REPORT else {rule: number for rule, number in jobs.items() if rule not in REPORT}


def shrink(config: dict) -> dict:
    """The demo with every size cut to seconds, and a base that is trained from scratch: the base, an adapter, all weights and a
    chat model; two lengths, two evaluation sets."""
    config["base_model"] = {"path": "results/demo/pretrained"}
    config["pretraining"] = {
        "paths": ["demo/texts/corpus-1.jsonl.xz"],
        "license": "PSF-2.0",
        "vocab_size": 512,
        "context": 128,
        "architecture": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2,
        },
        "rope_theta": 500,
        "steps": 4,
        "tokens_per_step": 512,
        "muon_learning_rate": 0.02,
        "adamw_learning_rate": 0.005,
    }  # fmt: skip
    config["corpus"].update(num_texts=50)
    config["sft"].update(num_records=20, max_tokens=1024, held_out=2)
    config["training"].update(steps=2, rank=4, logging_steps=1)
    config["systems"] = {name: config["systems"][name] for name in ("base", "longqlora", "longlora-full", "chat")}
    config["systems"]["chat"].update(target_context=1024, table_row=False)
    config["systems"]["chat"]["training"].update(steps=2)
    config["training"].update(batch_size=2)
    config["evaluation"]["lengths"] = [64, 256]
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


def read_lines(path: Path) -> list[bytes]:
    """The lines of a shipped file of texts."""
    return lzma.decompress(path.read_bytes()).splitlines(keepends=True)


def shorten(path: Path, num_bytes: int) -> None:
    """Leave the first records of a file, about so many bytes."""
    lines = read_lines(path)
    kept = [line for number, line in enumerate(lines) if sum(map(len, lines[:number])) < num_bytes]
    path.write_bytes(lzma.compress(b"".join(kept), preset=0))


def copy_project(root: Path, folder: Path) -> Path:
    """A copy of the project with the demo and its texts cut to seconds."""
    for name in PROJECT:
        copy = shutil.copytree if (root / name).is_dir() else shutil.copy
        copy(root / name, folder / name)
    edit(folder / "config/config.yaml", shrink)
    for name, num_bytes in {"corpus-0": 1_100_000, "corpus-1": 200_000, "prose": 6_000, "code": 2_000}.items():
        shorten(folder / f"demo/texts/{name}.jsonl.xz", num_bytes)
    return folder


@pytest.fixture(scope="module")
def project(root, tmp_path_factory) -> Path:
    """A copy of the project on which the whole workflow has run once."""
    folder = copy_project(root, tmp_path_factory.mktemp("project"))
    run = snakemake(folder)
    assert run.returncode == 0, run.stdout + run.stderr
    (folder / "terminal.txt").write_text(run.stdout + run.stderr)
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

    def append(name: str, line: str = "edited = True") -> None:
        path = project / name
        edited.setdefault(path, (path.read_text(), path.stat().st_mtime_ns))
        path.write_text(f"{path.read_text()}\n{line}\n")

    yield append
    for path, (text, modified) in edited.items():
        path.write_text(text)
        os.utime(path, ns=(modified, modified))


def test_the_run_leaves_tables_plots_models_and_records(project):
    results = project / "results/demo"
    cells = pandas.read_csv(results / "tables/perplexity.csv")
    assert sorted(zip(cells["system"], cells["dataset"], cells["eval_length"], strict=True)) == [
        (system, dataset, length)
        for system in ("base", "longlora-full", "longqlora") for dataset in ("code", "prose") for length in (64, 256)
    ]  # fmt: skip
    assert cells.groupby("dataset")["num_tokens"].nunique().tolist() == [1, 1]
    assert cells["num_tokens"].nunique() == 2
    assert (cells["num_scored"] == cells["num_tokens"] - cells["num_documents"]).all()
    assert cells["perplexity"].between(1, 512 * 2).all()
    assert cells["retrieval_accuracy"].between(0, 1).all()
    assert len(pandas.read_csv(results / "tables/differences.csv")) == 3 * 2 * 2  # pairs of systems, sets, lengths
    assert len(pandas.read_csv(results / "tables/retrieval.csv")) == 3 * 2 * 2  # systems, lengths, depths
    for name in (
        "tables/perplexity.md", "tables/perplexity.tex", "plots/perplexity.png", "plots/perplexity.svg",
        "tables/loss_by_position.csv", "plots/loss_by_position.png", "plots/loss_by_position.svg",
        "tables/answers.md", "tables/answers.tex", "tables/retrieval.md", "plots/retrieval.png", "plots/retrieval.svg",
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
    report = json.loads((results / "models/longqlora/merge_report.json").read_text())
    assert len(report["models"]) == 4
    assert report["published"] in report["models"]
    scaling = cells.set_index(["system", "dataset", "eval_length"])[["rope_scaling", "rope_factor", "target_context"]]
    assert scaling.loc["longqlora", "code", 64].tolist() == ["linear", 2.0, 256]
    assert scaling.loc["base", "prose", 64].tolist() == ["none", 1.0, 128]
    assert json.loads((results / "retrieval/longqlora/256.json").read_text())["rope_factor"] == 2.0


def test_the_chat_model_is_measured_on_what_it_was_not_trained_on_and_is_no_row_of_the_table(project):
    results = project / "results/demo"
    record = json.loads((results / "answers/chat.json").read_text())
    assert record["rope_factor"] == 8.0
    assert len(record["samples"]) == 2
    assert all(row["reference"] and row["messages"][-1]["role"] == "user" for row in record["samples"])
    row = pandas.read_csv(results / "tables/answers.csv").loc[0]
    assert (row["system"], row["num_conversations"]) == ("chat", 2)
    assert row["mean_nll_after"] < row["mean_nll_before"]
    assert not (results / "perplexity/chat").exists()
    assert not (results / "retrieval/chat").exists()
    assert set(pandas.read_csv(results / "tables/loss.csv")["label"]) > {"chat model"}
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


def test_the_base_is_trained_from_scratch_and_its_card_has_the_command(project):
    made = project / "results/demo/pretrained"
    assert {"config.json", "model.safetensors", "tokenizer.json"} < {path.name for path in made.iterdir()}
    card = (made / "README.md").read_text()
    assert "| made by | `snakemake results/demo/pretrained --cores 1 --configfile config/config.yaml` |" in card
    assert "| corpus-1.jsonl.xz |" in card
    assert "step 4 of 4: loss" in (project / "results/demo/logs/pretrain_model.log").read_text()


def test_the_report_shows_all_that_the_run_made_and_how_long_it_took(project):
    html = (project / "results/demo/report.html").read_text()
    assert re.findall(r'<section id="(\w+)"', html) == [
        "perplexity", "price", "retrieval", "training", "merges", "answers", "data", "cost", "plan", "provenance"
    ]  # fmt: skip
    jobs = sum(len(path.read_text().splitlines()) - 1 for path in project.glob("results/demo/benchmarks/**/*.tsv"))
    assert f'<td>all</td><td class="n">{jobs - 1}</td>' in html  # without the report itself


def test_the_plan_knows_all_jobs_and_gives_them_their_resources(project):
    plan = json.loads((project / "results/demo/plan.json").read_text())
    assert {job["stage"] for job in plan["jobs"]} == {"training", "merging", "perplexity", "retrieval"}
    assert {(job["problem"], job["fits"]) for job in plan["jobs"]} == {(None, True)}
    run = snakemake(project, "-n", "--forceall")
    found = re.findall(r"rule (\w+):\n(?:    .*\n)*?    resources: (.*)", run.stdout + run.stderr)
    assert {rule for rule, _ in found} > TRAINING | EVALUATION | {"sample_shard", "tokenize_corpus", "pretrain_model"}
    for name in ("mem_mb", "runtime", "attempt"):
        without = {rule for rule, resources in found if not re.search(rf"\b{name}=\d+\b", resources)}
        assert without <= TARGETS, name


def test_nothing_is_left_to_do(project):
    assert planned(project) == {}


# --- what the terminal shows -----------------------------------------------------------------------------------------------


def test_the_terminal_counts_the_jobs_and_names_what_to_look_at(project):
    lines = (project / "terminal.txt").read_text().splitlines()
    started = [line for line in lines if re.fullmatch(r"\[ *\d+ of \d+\] [^:]+", line)]
    numbers = [int(re.search(r"\d+", line)[0]) for line in started]
    assert numbers == list(range(1, len(started) + 1))
    assert f"{len(started)} jobs to run" in lines
    assert all(f"of {len(started)}] " in line for line in started)
    assert sum("] train LongQLoRA to 256" in line for line in started) == 1
    assert len([line for line in lines if not line.startswith("[")]) < 20
    shown = [line.split()[0] for line in lines if line.startswith("  results/")]
    assert shown[:2] == ["results/demo/report.html", "results/demo/tables/perplexity.md"]
    assert started[-1].endswith("] write the report")
    assert {"results/demo/answers/chat.md", "results/demo/models/longqlora"} <= set(shown)
    assert lines[-1] == [line for line in lines if line.startswith("  results/")][-1]


def test_the_log_of_snakemake_has_the_files_and_the_reason_of_each_job(project):
    log = "".join(path.read_text() for path in (project / ".snakemake/log").iterdir())
    assert "rule merge_adapter:\n    input: results/demo/adapters/longqlora" in log
    assert re.search(r"reason: Missing output files: .*results/demo/weights/longqlora", log)  # files in no fixed order
    assert "steps (100%) done" in log


def test_a_run_without_jobs_names_what_to_look_at_too(project):
    run = snakemake(project)
    assert "All files are up to date. Look at\n  results/demo/report.html" in run.stderr


def test_snakemakes_report_has_every_table_and_plot_with_its_caption(project, tmp_path):
    run = snakemake(project, "--report", str(tmp_path / "report.html"))
    assert run.returncode == 0, run.stdout + run.stderr
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    results, _ = json.JSONDecoder().raw_decode(page, page.index('var results = {"') + len("var results = "))
    shown = {Path(path).name: result for path, result in results.items()}
    plots = {"perplexity", "loss_by_position", "retrieval", "loss", "text_lengths", "sft_shares"}
    assert set(shown) == {"report.html", "perplexity.html", "retrieval.html", "answers.html"} | {
        f"{name}.svg" for name in plots
    }
    assert all(result["caption"] and result["labels"] for result in shown.values())


def test_snakemakes_own_output_comes_when_it_is_asked_for(project, tmp_path):
    folder = shutil.copytree(project, tmp_path / "project")
    (folder / "results/demo/plots/perplexity.png").unlink()
    run = snakemake(folder, "--quiet", "host")
    assert "rule plot_perplexity:" in run.stderr
    assert "3 of 3 steps (100%) done" in run.stderr
    assert "Look at" not in run.stderr


# --- what an edit of the code runs again -----------------------------------------------------------------------------------

EDITS = {
    "longqlora/evaluation/perplexity.py": {"evaluate_perplexity": 6, **PERPLEXITY_REPORTS},
    "longqlora/evaluation/token_losses.py": {"evaluate_perplexity": 6, "evaluate_retrieval": 6, **REPORTS, **ANSWERS},
    "longqlora/evaluation/retrieval_tasks.py": {"evaluate_retrieval": 6, "render_table": 1, "report_retrieval": 1},
    "longqlora/reporting/plots.py": {"plot_perplexity": 1, "plot_loss_by_position": 1},
    "longqlora/publishing/model_card.py": {"publish_model": 3},
    "longqlora/publishing/model_folder.py": {"publish_model": 3},
    "longqlora/evaluation/answers.py": ANSWERS,
    "longqlora/reporting/answer_report.py": {"report_answers": 1},
    "longqlora/publishing/merge_report.py": {
        "merge_adapter": 2, "publish_model": 2, "evaluate_perplexity": 2, "evaluate_retrieval": 2, **REPORTS, **ANSWERS,
    },
    "longqlora/reporting/records.py": REPORTS,
    "longqlora/reporting/tables.py": {"render_table": 1},
    "longqlora/modeling/compatibility.py": {},
    "longqlora/config/settings.py": {},
    "longqlora/config/systems.py": {},
    "longqlora/preflight.py": {},
    "longqlora/planning/peak_memory.py": {},
    "longqlora/jobs/log.py": {},
    "longqlora/jobs/gpus.py": {},
    "longqlora/jobs/machine.py": {},
    "workflow/scripts/render_table.py": {"render_table": 1},
    "longqlora/reporting/html_report.py": REPORT,
    "longqlora/reporting/report.html.jinja": REPORT,
    "longqlora/reporting/report.css": REPORT,
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_reruns_exactly_what_depends_on_it(project, module, name):
    module(name)
    assert planned(project) == EDITS[name]


@pytest.mark.parametrize("name", ["modeling/attention", "training/trainer", "training/adapters"])
def test_an_edit_of_what_decides_the_weights_retrains(project, module, name):
    module(f"longqlora/{name}.py")
    assert set(planned(project)) >= TRAINING
    assert set(planned(project)) <= TRAINING | EVALUATION | SHOWN


def test_an_edit_of_the_pretraining_makes_the_base_anew_and_all_that_depends_on_it(project, module):
    module("longqlora/training/pretraining.py")
    assert set(planned(project)) > {"pretrain_model", "prepare_evaluation_set", "tokenize_corpus", *TRAINING, *EVALUATION}


def test_the_reason_names_the_file_that_changed_and_no_other(project, module):
    module("longqlora/reporting/tables.py")
    run = snakemake(project, "-n", "results/demo/tables/perplexity.md")
    (reason,) = re.findall(r"reason: (Params have changed.*)", run.stdout)
    assert re.fullmatch(
        r".*before: longqlora/reporting/tables.py \w+ now: longqlora/reporting/tables.py \w+ *", reason.replace("'", "")
    )


def test_comments_docstrings_and_format_rerun_nothing(project, module):
    for path in [*project.glob("longqlora/**/*.py"), *project.glob("workflow/scripts/*.py")]:
        if path.name != "__init__.py":
            module(path.relative_to(project).as_posix(), '# a comment\n"""A docstring."""')
    assert planned(project) == {}


def test_another_label_renders_and_publishes_anew_and_measures_nothing(project, config_file):
    edit(config_file, lambda config: config["systems"]["longqlora"].update(label="Ours"))
    assert planned(project) == {"publish_model": 1, "plot_loss": 1, **REPORTS}


def test_labels_that_two_systems_exchange_draw_the_losses_anew(project, config_file):
    def exchange(config):
        systems = config["systems"]
        systems["longqlora"]["label"], systems["chat"]["label"] = systems["chat"]["label"], systems["longqlora"]["label"]

    edit(config_file, exchange)
    assert planned(project)["plot_loss"] == 1


def test_a_label_may_have_braces_and_a_system_may_be_called_none(project, config_file):
    """With adapters alone, so that no system trains all weights."""

    def add(config):
        del config["systems"]["longlora-full"]
        config["systems"]["none"] = {"label": "$x_{7B}$", "target_context": 256, "training": {"rank": 8}}

    edit(config_file, add)
    jobs = planned(project)
    assert (jobs["train_adapter"], jobs["plot_loss"]) == (1, 1)


def test_how_often_a_training_logs_and_saves_reruns_nothing_but_the_report_that_says_so(project, config_file):
    edit(config_file, lambda config: config["training"].update(logging_steps=7, checkpoint_steps=9))
    assert planned(project) == REPORT


def test_another_ratio_for_the_merge_merges_anew_and_trains_nothing(project, config_file):
    edit(config_file, lambda config: config.update(merge={"max_perplexity_ratio": 1.5}))
    jobs = planned(project)
    assert jobs["merge_adapter"] == 2
    assert not {"train_adapter", "train_model"} & set(jobs)


def test_a_merge_above_the_ratio_stops_the_run_with_its_figures(project, tmp_path):
    """By a merge that is wrong: weights of a hundred times their size."""
    folder = shutil.copytree(project, tmp_path / "project")
    module = folder / "longqlora/publishing/merging.py"
    text = module.read_text()
    module.write_text(text.replace("adapter.apply(name, prepare(name, weight))", "100 * weight"))
    assert module.read_text() != text
    run = snakemake(folder, "results/demo/models/longqlora")
    output = run.stdout + run.stderr
    assert run.returncode != 0
    assert re.search(
        r"the merge has perplexity \S+, the adapter as trained [\d.]+: a ratio of \S+, above merge.max_per", output
    )
    assert not (folder / "results/demo/weights/longqlora").exists()


# --- what a change of the configuration runs again -------------------------------------------------------------------------


def test_a_new_length_computes_the_new_cells_only(project, config_file):
    edit(config_file, lambda config: config["evaluation"].update(lengths=[64, 128, 256]))
    assert planned(project) == {"evaluate_perplexity": 3, "evaluate_retrieval": 3, **REPORTS}


def test_a_new_evaluation_set_is_measured_with_all_others_in_one_job_per_system_and_length(project, config_file):
    """The corpus must not have passages of it either, so that its texts are sampled anew."""
    more = {"label": "more", "paths": ["demo/texts/LICENSE.txt"]}
    edit(config_file, lambda config: config["evaluation"]["datasets"].update(more=more))
    jobs = planned(project)
    assert (jobs["prepare_evaluation_set"], jobs["evaluate_perplexity"]) == (1, 6)
    assert {"index_evaluation_sets", "sample_shard", "build_sft_set", *TRAINING, *EVALUATION} <= set(jobs)
    assert "pretrain_model" not in jobs


def test_one_evaluation_set_less_leaves_the_other_as_it_is(project, config_file):
    def remove(config):
        del config["evaluation"]["datasets"]["code"]

    edit(config_file, remove)
    jobs = planned(project)
    assert "prepare_evaluation_set" not in jobs
    assert jobs["evaluate_perplexity"] == 6
    assert jobs["index_evaluation_sets"] == 1


def test_another_shape_of_the_base_trains_it_anew(project, config_file):
    edit(config_file, lambda config: config["pretraining"]["architecture"].update(num_hidden_layers=1))
    assert set(planned(project)) > {"pretrain_model", *TRAINING, *EVALUATION}


def test_another_protocol_measures_perplexity_anew_and_nothing_else(project, config_file):
    edit(config_file, lambda config: config["evaluation"].update(protocol="longqlora"))
    assert planned(project) == {"evaluate_perplexity": 6, **PERPLEXITY_REPORTS}


def test_an_ablation_is_made_by_its_target_from_weights_that_are_there(project):
    """The row's rank is 4: its adapter is on the base in both grids, and rank 8 alone is trained."""
    assert planned(project, "ablations") == {"train_adapter": 1, "evaluate_perplexity": 6, "report_ablation": 2}
    table = "results/demo/tables/ablations/attention.csv"
    run = snakemake(project, table)
    assert run.returncode == 0, run.stdout + run.stderr
    cells = pandas.read_csv(project / table)
    assert cells["attention"].tolist() == cells["evaluation_attention"].tolist()
    assert (cells["weights"] == "adapter on the base").all()
    for _, prose in cells[cells["eval_length"] == 256].groupby("dataset"):
        assert prose["attention"].tolist() == ["full", "shifted_sparse"]
        assert prose["perplexity"].nunique() == 2
    assert (project / "results/demo/plots/ablations/attention.svg").exists()
    assert planned(project) == REPORT  # shows the ablations that are there, and asks for no others
    assert snakemake(project).returncode == 0
    assert '<section id="ablations">' in (project / "results/demo/report.html").read_text()
    assert planned(project) == {}


def test_an_edit_of_decontamination_makes_the_data_anew(project, module):
    module("longqlora/data/decontamination.py")
    assert {"index_evaluation_sets", "sample_shard", "sample_corpus", "build_sft_set"} <= set(planned(project))


def test_what_only_the_join_uses_joins_the_shards_anew_and_reads_none(project, config_file):
    edit(config_file, lambda config: config["corpus"].update(allow_fewer=True))
    jobs = planned(project, "data")
    assert jobs == {"sample_corpus": 1, "plot_text_lengths": 1, "tokenize_corpus": 1}


def test_a_further_file_is_read_alone(project, config_file):
    shutil.copy(project / "demo/texts/corpus-0.jsonl.xz", project / "more.jsonl.xz")
    edit(config_file, lambda config: config["corpus"]["sources"][0]["paths"].append("more.jsonl.xz"))
    assert planned(project, "data") == {"sample_shard": 1, "sample_corpus": 1, "plot_text_lengths": 1, "tokenize_corpus": 1}


def calls_of_a_dry_run(folder: Path, num_files: int) -> dict[tuple, tuple[int, float]]:
    """Function → number of calls, and share of the time, when a corpus of so many files is planned."""
    paths = [f"https://data.example.com/redpajama/c4-{number:05}.jsonl.zst" for number in range(num_files)]
    edit(folder / "config/config.yaml", lambda config: config["corpus"].update(sources=[{"paths": paths, "jobs": num_files}]))
    options = ["-n", "--cores", "1", "--quiet", "all", "--", "data"]
    command = [sys.executable, "-m", "cProfile", "-o", str(folder / "calls"), "-m", "snakemake", *options]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment())
    assert run.returncode == 0, run.stdout + run.stderr
    functions = pstats.Stats(str(folder / "calls")).stats
    total = sum(seconds for _, _, seconds, _, _ in functions.values())
    return {function: (calls, seconds / total) for function, (_, calls, seconds, _, _) in functions.items()}


def test_planning_takes_no_more_for_a_file_if_there_are_many(root, tmp_path):
    folder = copy_project(root, tmp_path)
    few, many = calls_of_a_dry_run(folder, 200), calls_of_a_dry_run(folder, 400)
    in_files = {function: calls for function, (calls, _) in many.items() if calls > 1000 and function[0] != "~"}
    assert [function for function, calls in in_files.items() if calls > 3 * few.get(function, [0])[0]] == []
    replacing = [share for (_, _, name), (_, share) in many.items() if name == "<method 'sub' of 're.Pattern' objects>"]
    assert sum(replacing) < 0.01  # a call takes as long as its pattern


def test_a_damaged_shard_stops_the_run_and_names_the_file(project, tmp_path):
    folder = shutil.copytree(project, tmp_path / "project")
    whole = (folder / "demo/texts/corpus-0.jsonl.xz").read_bytes()
    (folder / "torn.jsonl.xz").write_bytes(whole[: len(whole) // 2])
    source = {"paths": ["torn.jsonl.xz"]}
    edit(folder / "config/config.yaml", lambda config: config["corpus"]["sources"].append(source))
    run = snakemake(folder, "results/demo/corpus/sample.parquet")
    output = run.stdout + run.stderr
    assert run.returncode != 0
    assert "torn.jsonl.xz: the file is damaged, truncated or cannot be read (Compressed file ended" in output


def test_a_changed_rank_retrains_that_system_only(project, config_file):
    edit(config_file, lambda config: config["systems"]["longqlora"]["training"].update(rank=8))
    assert planned(project) == {
        "train_adapter": 1, "merge_adapter": 1, "publish_model": 1, "plot_loss": 1, "evaluate_perplexity": 2,
        "evaluate_retrieval": 2, **REPORTS,
    }  # fmt: skip


def test_another_rope_scaling_retrains_that_system_only(project, config_file):
    edit(config_file, lambda config: config["systems"]["longlora-full"].update(rope_scaling="yarn"))
    assert planned(project) == {
        "train_model": 1, "publish_model": 1, "plot_loss": 1, "evaluate_perplexity": 2, "evaluate_retrieval": 2, **REPORTS,
    }  # fmt: skip


def test_a_scaling_is_chosen_once_for_all_systems_that_share_target_data_and_precision(project, config_file):
    best = {"label": "best", "target_context": 256, "rope_scaling": "best", "training": {}}
    systems = {"best": best, "narrow": best | {"label": "narrow", "training": {"rank": 2}}}
    edit(config_file, lambda config: config["systems"].update(systems))
    assert planned(project)["choose_scaling"] == 1
    run = snakemake(project, "results/demo/scalings/256-corpus-nf4.json")
    assert run.returncode == 0, run.stdout + run.stderr
    edit(config_file, lambda config: config["training"].update(steps=3))
    assert "choose_scaling" not in planned(project)
    edit(config_file, lambda config: config["systems"]["best"].update(target_context=512))
    assert planned(project)["choose_scaling"] == 1


def test_a_system_that_is_trained_on_another_is_trained_again_with_it(project, config_file):
    def change(config, **settings):
        config["systems"]["longqlora"]["training"].update(settings)
        config["systems"]["tuned"] = {"base": "longqlora", "table_row": False, "training": {"data": "sft"}}

    edit(config_file, change)
    jobs = planned(project)
    assert (jobs["train_adapter"], jobs["merge_adapter"], jobs["publish_model"]) == (1, 1, 1)
    edit(config_file, lambda config: change(config, rank=8))
    jobs = planned(project)
    assert (jobs["train_adapter"], jobs["merge_adapter"], jobs["publish_model"]) == (2, 2, 2)


def test_a_published_model_is_a_row_of_its_own_with_its_own_tokenizer(project, config_file):
    published = {"label": "published", "model": "owner/model"}
    edit(config_file, lambda config: config["systems"].update(published=published))
    assert planned(project) == {
        "retokenize_evaluation_set": 2, "evaluate_perplexity": 2, "evaluate_retrieval": 2, **REPORTS,
    }  # fmt: skip


def test_a_system_that_the_base_cannot_be_trained_to_is_refused_before_any_job(project, config_file):
    edit(config_file, lambda config: config["systems"]["longqlora"].update(target_context=64, training={"rank": 500}))
    run = snakemake(project, "-n")
    output = run.stdout + run.stderr
    assert run.returncode != 0
    assert "target_context 64 is below the model's own context of 128 tokens" in output
    assert "rank 500 is above the model's width, hidden_size 32" in output


def test_targets_run_their_part_alone(project, module, config_file):
    edit(config_file, lambda config: config["systems"]["longqlora"]["training"].update(rank=8))
    module("longqlora/reporting/plots.py")
    assert planned(project, "data") == {}
    assert planned(project, "train") == {"train_adapter": 1, "merge_adapter": 1, "publish_model": 1}
    assert set(planned(project, "evaluate")) == {"train_adapter", "merge_adapter", "evaluate_perplexity", "evaluate_retrieval"}
    assert set(planned(project, "perplexity_report")) == {"train_adapter", "merge_adapter"} | EVALUATION


def test_without_held_out_conversations_no_answers_are_compared_and_their_target_says_why(project, config_file):
    edit(config_file, lambda config: config["sft"].update(held_out=0))
    assert "evaluate_answers" not in planned(project)
    run = snakemake(project, "-n", "answers")
    assert run.returncode != 0
    assert "this needs a system with training.data: sft, and sft.held_out above 0" in run.stdout + run.stderr


def test_other_texts_of_an_evaluation_set_are_indexed_anew(project, tmp_path):
    folder = shutil.copytree(project, tmp_path / "project")
    shorten(folder / "demo/texts/prose.jsonl.xz", 5_000)
    jobs = planned(folder)
    assert (jobs["prepare_evaluation_set"], jobs["index_evaluation_sets"]) == (1, 1)
    assert {"sample_shard", "sample_corpus", "build_sft_set"} <= set(jobs)


def test_a_wrong_config_fails_before_any_job_with_a_short_message(project, config_file):
    edit(config_file, lambda config: config["training"].update(rnk=8))
    run = snakemake(project)
    output = run.stdout + run.stderr
    assert run.returncode != 0
    assert "training: unknown key 'rnk'; did you mean 'rank'?" in output
    assert "Traceback" not in output
    assert len(output.splitlines()) < 12


def test_what_is_elsewhere_and_cannot_be_read_is_told_before_the_first_job(project, config_file):
    published = {"label": "published", "model": "owner/model"}
    edit(config_file, lambda config: config["systems"].update(published=published))
    assert planned(project)
    started = sorted((project / "results/demo/logs").rglob("*"))
    run = snakemake(project)
    output = run.stdout + run.stderr
    assert run.returncode != 0
    assert "no job has started, because these cannot be read:\nsystems.published.model: owner/model is not in " in output
    assert "Traceback" not in output
    assert len(output.splitlines()) < 12
    assert sorted((project / "results/demo/logs").rglob("*")) == started


def test_a_job_that_fails_names_its_log_and_the_reason(project, tmp_path):
    folder = shutil.copytree(project, tmp_path / "project")  # the failed job takes its former output along
    edit(folder / "config/config.yaml", lambda config: config["corpus"].update(num_texts=10**6))
    run = snakemake(folder, "results/demo/corpus/sample.parquet")
    output = run.stdout + run.stderr
    assert run.returncode != 0
    assert "] join the sampled texts: failed after" in output
    *_, log, reason = [line for line in output.splitlines() if line.startswith("  log: ") or line.startswith("  reason: ")]
    assert log == "  log: results/demo/logs/sample_corpus.log"
    assert reason.startswith("  reason: corpus.num_texts asks for 1000000 texts")
    assert len(output.splitlines()) < 25
    text = (folder / log.removeprefix("  log: ")).read_text()
    assert text.count("Traceback") == text.count("ERROR error: ") == output.count("failed after") == 1
    assert text.endswith("attempt 3 failed, and another one would fail in the same way\n")
    assert "attempt 2" not in output
    edit(folder / "config/config.yaml", lambda config: config["corpus"].update(num_texts=40))
    run = snakemake(folder, "results/demo/corpus/sample.parquet")
    assert run.returncode == 0, run.stdout + run.stderr


# --- what changes nothing --------------------------------------------------------------------------------------------------


def test_touching_code_and_config_reruns_nothing(project):
    for pattern in ("longqlora/**/*.py", "workflow/**/*.*", "config/config.yaml", "demo/**/*.*"):
        for path in project.glob(pattern):
            path.touch()
    assert planned(project) == {}


def test_a_moved_checkout_reruns_nothing(project, tmp_path):
    shutil.copytree(project, tmp_path / "elsewhere")  # with the dates of the files, as mv keeps them
    assert planned(tmp_path / "elsewhere") == {}


def test_conda_switched_on_and_a_comment_in_its_environment_rerun_nothing(project, tmp_path, monkeypatch):
    """With a stand-in that answers what Snakemake asks conda for; a dry run makes no environment."""
    conda = tmp_path / "bin/conda"
    conda.parent.mkdir()
    answer = '{"conda_prefix": "/opt/conda", "platform": "linux-64", "get": {"channel_priority": "strict"}}'
    conda.write_text(f"#!/bin/sh\n[ \"$1\" = --version ] && echo conda 26.7.0 || echo '{answer}'\n")
    conda.chmod(0o755)
    monkeypatch.setenv("PATH", f"{conda.parent}:{os.environ['PATH']}")
    environment = project / "environment.yml"
    before = environment.read_text()
    assert planned(project, "--use-conda") == {}
    environment.write_text("# a comment\n" + before)
    assert planned(project, "--use-conda") == {}
    environment.write_text(before)


def test_containers_switched_on_rerun_nothing_and_no_job_starts_without_the_image(project, tmp_path, monkeypatch):
    """With a stand-in that says only its version."""
    apptainer = tmp_path / "bin/apptainer"
    apptainer.parent.mkdir()
    apptainer.write_text("#!/bin/sh\necho apptainer version 1.4.0\n")
    apptainer.chmod(0o755)
    monkeypatch.setenv("PATH", f"{apptainer.parent}:{os.environ['PATH']}")
    assert planned(project, "--sdm", "apptainer") == {}
    run = snakemake(project, "--sdm", "apptainer", "--force", "--", "results/demo/plots/text_lengths.png")
    assert run.returncode == 1
    assert "no job has started: there is no container.sif in this folder" in run.stdout + run.stderr
    assert planned(project) == {}


@pytest.mark.parametrize("snakefile", ["Snakefile", "workflow/Snakefile"])
def test_another_main_file_and_working_directory_rerun_nothing(project, tmp_path, snakefile):
    """The same profile, the same package, the same digests of the code, and the same default target."""
    where = ["-s", str(project / snakefile), "--directory", str(project)]
    assert planned(tmp_path, *where) == {}
    (project / "results/demo/plots/text_lengths.png").unlink()
    assert planned(tmp_path, *where) == {"plot_text_lengths": 1}
    run = snakemake(tmp_path, *where)
    assert run.returncode == 0, run.stdout + run.stderr
    assert (project / "results/demo/plots/text_lengths.png").is_file()


def test_unlocking_needs_no_number_of_cores(project):
    run = subprocess.run([sys.executable, "-m", "snakemake", "--unlock"], cwd=project, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


DRIVER = """
import sys
for name in ("numpy", "torch", "pandas", "transformers", "tokenizers", "pyarrow", "matplotlib"):
    sys.modules[name] = None  # an import of it fails
from snakemake.cli import main
main(sys.argv[1:])
"""


@pytest.mark.skipif(find_spec("snakemake_executor_plugin_slurm") is not None, reason="the extra slurm needs pandas")
def test_a_driver_needs_snakemake_and_the_checks_alone(root, tmp_path):
    """Every shipped configuration is planned where nothing of the jobs is installed."""
    for name in PROJECT:
        copy = shutil.copytree if (root / name).is_dir() else shutil.copy
        copy(root / name, tmp_path / name)
    for name in ("corpus/a.jsonl", "books/a.txt", "proofs/a.txt", "stories/train.jsonl", "stories/held-out.txt"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text("x")
    for name in ("tinystories-656k", "my-model"):
        shutil.copytree(root / "demo/model", tmp_path / "data/models" / name)
    configs = [[str(path)] for path in sorted((tmp_path / "config").glob("*.yaml")) if path.stem != "ablations"]
    configs.append([str(tmp_path / "config/config.yaml"), str(tmp_path / "config/ablations.yaml")])
    assert len(configs) >= 8
    for config in configs:
        command = [sys.executable, "-c", DRIVER, "-n", "--cores", "1", "--configfile", *config]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
        assert "Job stats" in run.stdout


# --- files that the user keeps ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(root, project, tmp_path_factory) -> Path:
    """A project whose base model and texts are the user's own files, where everything has run."""
    folder = copy_project(root, tmp_path_factory.mktemp("own"))
    shutil.copytree(project / "results/demo/pretrained", folder / "own/base")
    shutil.copytree(folder / "demo/texts", folder / "own/texts")
    corpus = folder / "own/texts/corpus.jsonl"
    corpus.write_bytes(b"".join(read_lines(folder / "own/texts/corpus-0.jsonl.xz")))
    assert corpus.stat().st_size > 10**6  # which Snakemake compares by its date

    def use_own(config):
        text = yaml.safe_dump(config).replace("demo/texts", "own/texts")
        config.clear()
        config.update(yaml.safe_load(text))
        del config["pretraining"], config["ablations"]
        config.update(experiment="own", base_model={"path": "own/base"})
        config["corpus"]["sources"] = [{"paths": ["own/texts/corpus.jsonl"]}]
        config["systems"] = {name: config["systems"][name] for name in ("base", "longqlora", "chat")}
        config["evaluation"]["lengths"] = [256]

    edit(folder / "config/config.yaml", use_own)
    run = snakemake(folder)
    assert run.returncode == 0, run.stdout + run.stderr
    assert planned(folder) == {}
    return folder


@pytest.fixture
def restored(own):
    """The user's files, put back after the test."""
    shutil.copytree(own / "own", own / "before")
    yield own
    shutil.rmtree(own / "own")
    (own / "before").rename(own / "own")


def test_new_dates_and_stray_files_rerun_nothing(restored):
    for path in restored.glob("own/**/*"):
        os.utime(path)
    for name in ("base/.DS_Store", "base/README.md", "base/training.log", "texts/notes.md"):
        (restored / "own" / name).write_text("x")
    (restored / "own/base").touch()
    assert planned(restored) == {}


def test_new_weights_in_a_local_base_are_noticed_and_no_data_made_anew(restored):
    file = restored / "own/base/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1  # a bit of the last weight
    file.write_bytes(data)
    assert planned(restored) == {
        "train_adapter": 2, "merge_adapter": 2, "publish_model": 2, "plot_loss": 1,
        "evaluate_perplexity": 2, "evaluate_retrieval": 2, **REPORTS, **ANSWERS,
    }  # fmt: skip
    run = snakemake(restored, "-n", "results/own/adapters/longqlora")
    assert re.search(r"Params have changed.*own/base/config.json, own/base/model.safetensors \w+", run.stdout)


def test_other_generation_settings_of_a_local_base_are_published_and_answers_end_by_them(restored):
    (restored / "own/base/generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.5}')
    assert planned(restored) == {"publish_model": 2, **ANSWERS}


def test_another_chat_template_is_for_conversations_alone(restored):
    (restored / "own/base/chat_template.jinja").write_text("{{ messages }}")
    jobs = planned(restored)
    assert {"build_sft_set", "tokenize_sft"} <= set(jobs)
    assert jobs["train_adapter"] == 1  # the chat model, not the one trained on texts
    assert not {"prepare_evaluation_set", "sample_shard", "sample_corpus", "tokenize_corpus"} & set(jobs)


def test_another_tokenizer_file_makes_the_data_anew(restored):
    file = restored / "own/base/tokenizer.json"
    file.write_text(file.read_text().replace('"use_regex": true', '"use_regex": false'))
    jobs = planned(restored)
    assert {"prepare_evaluation_set", "sample_shard", "tokenize_sft", "train_adapter"} <= set(jobs)


def test_other_texts_in_a_large_file_of_the_same_size_are_noticed(restored):
    file = restored / "own/texts/corpus.jsonl"
    text = file.read_text()
    file.write_text(text.replace(" the ", " The ", 1))
    assert file.stat().st_size == len(text.encode())
    jobs = planned(restored, "data")
    assert jobs == {"sample_shard": 1, "sample_corpus": 1, "plot_text_lengths": 1, "tokenize_corpus": 1}


# --- kills -----------------------------------------------------------------------------------------------------------------


def run_and_kill(folder: Path, target: str, checkpoints: Path, moment: float) -> None:
    """Start the workflow, and kill it with all its jobs ``moment`` seconds after it has written a new checkpoint."""
    command = [sys.executable, "-m", "snakemake", "--cores", "2", target]
    before, silent = set(checkpoints.glob("checkpoint-*")), subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=folder, stdout=silent, stderr=silent, env=environment(), start_new_session=True)
    while process.poll() is None and set(checkpoints.glob("checkpoint-*")) <= before:
        time.sleep(0.02)
    time.sleep(moment)
    assert process.poll() is None, "it was over before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert snakemake(folder, "--unlock").returncode == 0


def is_script(process: psutil.Process, name: str) -> bool:
    """Whether a process is Python with a script of the workflow."""
    command = process.cmdline()
    return len(command) > 1 and "python" in Path(command[0]).name and command[-1].endswith(f".{name}.py")


def test_a_training_that_is_killed_goes_on_in_a_further_attempt(root, tmp_path):
    folder, target = copy_project(root, tmp_path), "results/demo/adapters/longqlora"
    edit(folder / "config/config.yaml", lambda config: config["training"].update(steps=300, checkpoint_steps=25))
    checkpoints = folder / "results/demo/checkpoints/longqlora"
    command, output = [sys.executable, "-m", "snakemake", "--cores", "2", target], subprocess.PIPE
    driver = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, text=True, env=environment())
    while driver.poll() is None and not any(checkpoints.glob("checkpoint-*")):
        time.sleep(0.02)
    (job,) = [each for each in psutil.Process(driver.pid).children(recursive=True) if is_script(each, "train")]
    job.kill()
    shown, _ = driver.communicate()
    assert driver.returncode == 0, shown
    assert "attempt 2" in shown
    assert json.loads((folder / "results/demo/training/longqlora.json").read_text())["resumed_from_step"] >= 25


def test_a_workflow_that_is_killed_twice_ends_in_the_very_same_adapter(root, tmp_path):
    folder, target = copy_project(root, tmp_path), "results/demo/adapters/longqlora"
    edit(folder / "config/config.yaml", lambda config: config["training"].update(steps=300, checkpoint_steps=25))
    checkpoints = folder / "results/demo/checkpoints/longqlora"
    for moment in random.Random(7).sample([0.0, 0.2, 0.4, 0.6, 0.8], 2):
        run_and_kill(folder, target, checkpoints, moment=moment)
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
