"""Plans of experiments, where simple sums replace the traces of memory: what is asked of a trace, and what follows from it."""

import json
from dataclasses import replace
from functools import partial

import pytest

from longqlora.config.experiment import load_experiment
from longqlora.planning import cost, peak_memory, training_plans
from longqlora.planning.cards import Card
from longqlora.planning.models import config_to_plan
from longqlora.planning.peak_memory import Memory
from longqlora.planning.plan import Planner
from longqlora.planning.plan_file import job_resources
from longqlora.planning.plan_table import format_contexts, format_plan

CARD = Card("card", memory=100_000, compute="bfloat16", matmul_rate=1e12, bandwidth=1e12)
FORM_BYTES = {"all": 8, "linear_outputs": 4, "layer_inputs": 2, "offloaded": 1}  # per token


@pytest.fixture
def traces(monkeypatch) -> list[tuple]:
    """Replaces the traces by a sum over the tokens of a batch, and lists the trainings that are traced."""
    traced = []

    def training_memory(model, extension, settings, device, compute, form) -> Memory:
        traced.append((extension.target_context, settings, form))
        tokens = settings.batch_size * (settings.pose_window or extension.target_context)
        weights = {"qlora": 20_000, "lora": 50_000, "full": 200_000}[settings.method]
        weights -= 10_000 if settings.optimizer == "paged_adamw_8bit" else 0
        return Memory({"weights": weights, "layer inputs": FORM_BYTES[form] * tokens}, "matmul", host=1_000_000)

    monkeypatch.setattr(training_plans, "training_memory", training_memory)
    monkeypatch.setattr(peak_memory, "merging_memory", lambda *arguments, **options: Memory({"weights": 9}, "", 10))
    monkeypatch.setattr(peak_memory, "retrieval_memory", lambda *arguments, **options: Memory({"weights": 9}, "", 10))
    monkeypatch.setattr(
        peak_memory, "evaluation_memory", lambda model, window, *_, **options: Memory({"weights": window}, "", 10)
    )
    for name in ("training_seconds", "merging_seconds", "evaluation_seconds", "retrieval_seconds"):
        monkeypatch.setattr(cost, name, lambda *arguments, **options: None)
    return traced


def plan_of(config: dict, card: Card = CARD) -> dict:
    """The plan of a configuration, as its JSON file has it, with the longest contexts."""
    experiment = load_experiment(config)
    planner = Planner(experiment, card, partial(config_to_plan, experiment, {}))
    return json.loads(json.dumps(planner.plan() | {"longest_context": dict(planner.longest_contexts())}))


def jobs_of(made: dict, stage: str) -> dict[str, dict]:
    return {job["system"]: job for job in made["jobs"] if job["stage"] == stage}


def change_of(demo: dict, card: Card = CARD, **training) -> dict:
    """The change that is proposed for the system ``longqlora`` of the demo with these settings."""
    demo["systems"] = {"base": {}, "longqlora": {"target_context": training.pop("context", 8192), "training": training}}
    return jobs_of(plan_of(demo, card), "training")["longqlora"]["change"]


def test_every_job_that_runs_a_model_is_planned(demo, traces):
    made = plan_of(demo)
    found = {(job["stage"], job["system"], job["length"]) for job in made["jobs"]}
    assert ("training", "chat", 256) in found
    assert ("merging", "longqlora-512", 512) in found
    assert ("merging", "longlora-full", 256) not in found  # all weights are trained: there is nothing to merge
    assert {length for stage, system, length in found if (stage, system) == ("perplexity", "base")} == {128, 256, 512}
    assert ("retrieval", "interpolated", 512) in found
    assert ("retrieval", "interpolated", 256) not in found  # only the longest
    assert not any(stage == "perplexity" and system == "chat" for stage, system, _ in found)  # no row of the table
    assert all(job["problem"] is None for job in made["jobs"])


def test_equal_trainings_are_traced_once(demo, traces):
    same = {"target_context": 256, "training": {"steps": 9, "learning_rate": 0.1}}
    other = {"target_context": 256, "rope_scaling": "yarn", "training": {"full_attention_share": 0.5}}
    demo["systems"] = {"base": {}, "one": {"target_context": 256, "training": {}}, "two": same, "three": other}
    plan_of(demo)
    contexts = [(context, form) for context, settings, form in traces if context == 256]
    assert len(contexts) == len(set(contexts))


def test_the_fastest_form_that_fits_is_planned(demo, traces):
    demo["training"]["memory"] = "auto"
    demo["systems"] = {"base": {}, "longqlora": {"target_context": 1024, "training": {"batch_size": 8}}}
    job = jobs_of(plan_of(demo), "training")["longqlora"]
    assert (job["form"], job["peak"], job["fits"], job["change"]) == ("all", 20_000 + 8 * 8192, True, None)
    job = jobs_of(plan_of(demo, replace(CARD, memory=60_000)), "training")["longqlora"]
    assert (job["form"], job["peak"], job["fits"]) == ("linear_outputs", 20_000 + 4 * 8192, True)


@pytest.mark.parametrize(
    ("memory_of_card", "training", "settings"),
    [
        (
            100_000,
            {"batch_size": 8, "gradient_accumulation": 2, "memory": "speed"},
            {"batch_size": 1, "gradient_accumulation": 16},
        ),
        (
            45_000,
            {"batch_size": 6, "gradient_accumulation": 1, "memory": "auto"},
            {"batch_size": 3, "gradient_accumulation": 2},
        ),
    ],
)
def test_a_smaller_batch_is_the_cheapest_change(demo, traces, memory_of_card, training, settings):
    """The product of both stays, so that the result is the same."""
    assert change_of(demo, replace(CARD, memory=memory_of_card), **training)["settings"] == settings


def test_further_changes_are_tried_in_their_order(demo, traces):
    demo["training"]["optimizer"] = "paged_adamw_32bit"
    window = {"batch_size": 1, "gradient_accumulation": 1, "context": 8192}
    assert change_of(demo, replace(CARD, memory=60_000), memory="speed", **window)["settings"] == {"memory": "auto"}
    tight = change_of(demo, replace(CARD, memory=25_000), memory="auto", **window)
    assert tight["settings"] == {"optimizer": "paged_adamw_8bit"}
    full = change_of(demo, replace(CARD, memory=70_000), memory="auto", method="full", **window)
    assert full["settings"] == {"method": "qlora"}
    shorter = change_of(demo, replace(CARD, memory=14_500), memory="smallest", **window)
    assert shorter["settings"] == {"optimizer": "paged_adamw_8bit", "target_context": 4096}
    assert shorter["peak"] == 10_000 + 4096
    assert change_of(demo, replace(CARD, memory=5_000), **window) is None


def test_the_longest_context_is_the_one_with_which_a_training_fits(demo, traces):
    demo["training"]["memory"] = "smallest"
    demo["systems"] = {"base": {}, "longqlora": {"target_context": 256, "training": {"batch_size": 1}}}
    made = plan_of(demo, replace(CARD, memory=20_000 + 7_300))
    assert made["longest_context"] == {"longqlora": 7168}
    assert "7,168 (longqlora)" in format_contexts(made["longest_context"])
    assert format_contexts({"one": None}) == ""


def test_what_cannot_be_planned_says_why_and_stops_nothing(demo, traces, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("an unusual layer")

    monkeypatch.setattr(training_plans, "training_memory", fail)
    demo["systems"] = {"base": {}, "far": {"model": "nobody/nothing"}, "longqlora": {"target_context": 256, "training": {}}}
    made = plan_of(demo)
    assert jobs_of(made, "training")["longqlora"]["problem"] == "an unusual layer"
    assert "--model nobody/nothing=FOLDER" in jobs_of(made, "perplexity")["far"]["problem"]
    assert jobs_of(made, "perplexity")["base"]["problem"] is None
    assert made["longest_context"] == {"longqlora": None}
    text = format_plan(made)
    assert "Not planned: longqlora. an unusual layer" in text


def test_a_cell_that_does_not_fit_is_told_the_precision_or_the_length_with_which_it_does(demo, traces, monkeypatch):
    def memory(model, length, precision, *_, **options) -> Memory:
        return Memory({"weights": 20_000 if precision == "nf4" else 80_000, "layer inputs": 10 * length}, "", 10)

    monkeypatch.setattr(peak_memory, "evaluation_memory", memory)
    demo["systems"] = {"base": {"precision": "bfloat16"}, "small": {"precision": "nf4"}}
    demo["evaluation"]["lengths"], demo["retrieval"]["lengths"] = [128, 4096], [4096]
    made = plan_of(demo, replace(CARD, memory=82_000))
    found = [(job["system"], job["length"], job["fits"], job["change"]) for job in made["jobs"] if job["stage"] == "perplexity"]
    assert found[:2] == [
        ("base", 128, True, None),
        ("base", 4096, False, {"settings": {"precision": "nf4"}, "peak": 20_000 + 40_960}),
    ]
    assert "The cheapest change with which it does: precision: nf4" in " ".join(format_plan(made).split())
    tight = jobs_of(plan_of(demo, replace(CARD, memory=40_000)), "perplexity")  # the longest length comes last
    assert tight["base"]["change"] == {"settings": {"precision": "nf4", "length": 1024}, "peak": 30_240}
    assert tight["small"]["change"] == {"settings": {"length": 1024}, "peak": 30_240}


def test_a_model_that_cannot_be_read_is_asked_for_once(demo, traces):
    demo["systems"] = {"far": {"model": "nobody/nothing"}}
    asked = []

    def read(path):
        asked.append(path)
        raise ValueError("no network")

    Planner(load_experiment(demo), CARD, read).plan()
    assert sorted(asked) == sorted({*asked})
    assert "nobody/nothing" in asked


def test_what_is_being_planned_is_told(demo, traces):
    told = []
    experiment = load_experiment(demo)
    Planner(experiment, CARD, partial(config_to_plan, experiment, {}), told.append).plan()
    assert "training of longqlora at 256 tokens" in told


def test_without_a_known_memory_nothing_is_said_about_what_fits(demo, traces):
    made = plan_of(demo, replace(CARD, memory=None))
    assert {job["fits"] for job in made["jobs"]} == {None}
    assert all(job["peak"] for job in made["jobs"])
    assert set(made["longest_context"].values()) == {None}


def test_a_system_on_another_one_has_the_shape_of_the_model_that_was_trained_first(demo, traces):
    demo["systems"] = {
        "base": {},
        "first": {"target_context": 256, "training": {}},
        "second": {"base": "first", "target_context": 512, "training": {}},
    }
    made = plan_of(demo)
    assert jobs_of(made, "training")["second"]["problem"] is None


def test_the_table_is_readable_in_a_terminal(demo, traces):
    demo["training"].update(memory="speed", batch_size=8)
    text = format_plan(plan_of(demo, replace(CARD, memory=35_000)))
    assert max(map(len, text.splitlines())) <= 100
    assert "longqlora-512" in text
    assert "does not fit. The cheapest change with which it does:" in text
    assert "batch_size: 4, gradient_accumulation: 2" in text


# --- what the rules ask of a cluster ---------------------------------------------------------------------------------------


@pytest.fixture
def plan_file(tmp_path):
    job = {"stage": "training", "system": "a", "length": 8192, "host": 4_000_000_000, "peak": 8_000_000_000, "seconds": 3600}
    cells = [{"stage": "perplexity", "system": "a", "length": length, "host": length * 10**6} for length in (512, 1024)]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"device": {"kind": "cuda"}, "jobs": [job, *cells]}))
    return path


def test_resources_are_those_of_the_plan_and_more_on_a_retry(plan_file):
    first = job_resources(plan_file, "training", "a", None, attempt=1)
    assert first == {"mem": 5000, "gpu_mem_mb": 10_000, "runtime": 130}
    second = job_resources(plan_file, "training", "a", None, attempt=2)
    assert all(second[name] > value for name, value in first.items())
    assert job_resources(plan_file, "perplexity", "a", 512, attempt=1) == {"mem": 640}


def test_a_stage_that_is_not_planned_has_the_memory_of_the_systems_largest_job_and_the_time_that_is_given(plan_file):
    assert job_resources(plan_file, "answers", "a", None, 1) == {"mem": 5000, "gpu_mem_mb": 10_000}
    assert job_resources(plan_file, "answers", "a", None, 1, minutes=60) == {"mem": 5000, "gpu_mem_mb": 10_000, "runtime": 60}
    assert job_resources(plan_file, "training", "a", None, 2, minutes=60)["runtime"] == 90
    assert job_resources(plan_file, "answers", "unknown", None, 1, minutes=60) == {"runtime": 60}


def test_without_a_plan_there_are_no_resources(plan_file, tmp_path):
    assert job_resources(tmp_path / "none.json", "training", "a", None, 1) == {}
    assert job_resources(plan_file, "training", "unknown", None, 1) == {}
    plan_file.write_text("{")
    assert job_resources(plan_file, "training", "a", None, 1) == {}
    plan_file.write_text(json.dumps({"device": None, "jobs": [], "problem": "why"}))
    assert job_resources(plan_file, "training", "a", None, 1) == {}


@pytest.mark.parametrize("job", [{}, {"stage": "training", "system": "a", "host": "12"}, [], None])
def test_a_job_of_another_version_gives_no_resources(plan_file, job):
    plan_file.write_text(json.dumps({"device": {"kind": "cuda"}, "jobs": [job]}))
    assert job_resources(plan_file, "training", "a", None, 1) == {}


def test_a_length_that_is_not_planned_has_the_resources_of_the_longest(plan_file):
    assert job_resources(plan_file, "perplexity", "a", 100, 1) == job_resources(plan_file, "perplexity", "a", 1024, 1)


def test_processes_on_a_cpu_share_its_memory(demo, traces):
    cpu = replace(CARD, name="CPU", compute="float32", memory=2 * 85_000)
    demo["systems"] = {"base": {}, "longqlora": {"target_context": 8192, "training": {"num_processes": 2}}}
    demo["training"] = {"steps": 1, "batch_size": 1}
    job = jobs_of(plan_of(demo, cpu), "training")["longqlora"]
    assert (job["form"], job["fits"], job["host"]) == ("linear_outputs", True, 2_000_000)  # 20,000 + 4 x 8192 of 85,000
