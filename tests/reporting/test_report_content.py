import json

from sample_report import SCRIPT, sources_of, write_benchmark, write_evaluation, write_json, write_training

from longqlora.reporting.plan_check import plan_check
from longqlora.reporting.report_content import collect, cost

MIB = 2**20


def test_a_section_without_data_has_no_content(tmp_path):
    write_evaluation(tmp_path)
    content = collect(sources_of(tmp_path))
    there = {name for name, found in content.items() if found}
    assert there == {"summary", "perplexity", "price", "retrieval", "provenance"}


def test_files_that_the_report_is_not_given_are_left_out(tmp_path):
    """They may be of an earlier configuration."""
    write_evaluation(tmp_path)
    write_training(tmp_path)
    files = [str(tmp_path / f"tables/{name}") for name in ("perplexity.md", "perplexity.csv", "differences.csv")]
    content = collect(sources_of(tmp_path, files=files))
    assert content["training"] is content["retrieval"] is content["data"] is content["answers"] is None


def test_training_and_merge_are_listed_by_label(tmp_path):
    write_evaluation(tmp_path)
    write_training(tmp_path)
    content = collect(sources_of(tmp_path))
    assert list(content["training"]["cards"]) == [SCRIPT]
    (merge,) = content["merges"]["rows"]
    assert (merge["label"], merge["name"], merge["merged"]["perplexity"]) == (SCRIPT, "16-bit", 7.125)
    assert content["data"]["corpus"]["columns"] == ["read", "sampled"]  # no text was malformed


def test_time_and_memory_are_those_of_the_jobs_of_the_experiment(tmp_path):
    write_benchmark(tmp_path, "train/long", 60, "2048.0")
    write_benchmark(tmp_path, "train/base", 30, "-")
    write_benchmark(tmp_path, "train/a-system-that-is-gone", 1000)
    write_benchmark(tmp_path, "evaluate_perplexity/long/256", 5)
    write_benchmark(tmp_path, "evaluate_perplexity/long/512", 1000)  # a length that is gone
    write_benchmark(tmp_path, "a_new_rule", 1)
    found = cost(sources_of(tmp_path))
    assert found["seconds"] == 96
    assert found["rows"] == [
        {"stage": "training", "jobs": 2, "seconds": 90, "longest": 60, "memory": 2048 * MIB},
        {"stage": "perplexity", "jobs": 1, "seconds": 5, "longest": 5, "memory": 1024 * MIB},
        {"stage": "tables and plots", "jobs": 1, "seconds": 1, "longest": 1, "memory": 1024 * MIB},
    ]


def test_the_whole_configuration_and_the_digests_are_there(tmp_path):
    write_evaluation(tmp_path)
    write_training(tmp_path)
    found = collect(sources_of(tmp_path, checkout="v0.2.0-3-gabc"))["provenance"]
    assert "seed: 1\n" in found["configuration"]
    assert found["facts"]["commit of the report's code"] == ["v0.2.0-3-gabc"]
    assert found["facts"]["training data"] == ["corpus.bin, SHA-256 " + "ab" * 32]
    assert found["files"][0]["sha256"] == "cd" * 32


def planned_job(stage: str, system: str, length: int, host: int | None, seconds: float | None, **changes) -> dict:
    """A job of a plan on a CPU."""
    return {"stage": stage, "system": system, "length": length, "host": host, "peak": host, "seconds": seconds, **changes}


def test_the_plan_is_compared_with_what_its_jobs_took(tmp_path):
    jobs = [
        planned_job("training", "long", 256, 1000, 50),
        planned_job("perplexity", "base", 256, 2000, 4),
        planned_job("perplexity", "long", 256, 3000, None),
        planned_job("perplexity", "long", 128, 9000, 9),  # has not run
        planned_job("retrieval", "long", 256, None, None),  # could not be planned
        planned_job("retrieval", "gone", 256, 10, 10),  # of an earlier configuration
    ]
    write_json(tmp_path / "plan.json", {"device": {"kind": "cpu", "name": "CPU"}, "jobs": jobs})
    write_benchmark(tmp_path, "train/long", 60, "2.0")
    for cell in ("perplexity/base/256", "perplexity/long/256", "retrieval/long/256", "retrieval/gone/256"):
        write_benchmark(tmp_path, f"evaluate_{cell}", 5, "1.0")
    assert plan_check(sources_of(tmp_path))["rows"] == [
        {"stage": f"training of {SCRIPT}", "jobs": 1, "memory": (1000, 2 * MIB), "seconds": (50, 60)},
        {"stage": "perplexity", "jobs": 2, "memory": (3000, MIB), "seconds": None},
    ]


def test_the_memory_of_a_training_on_a_gpu_is_that_of_the_gpu(tmp_path):
    write_evaluation(tmp_path)
    write_training(tmp_path)
    card = json.loads((tmp_path / "training/long.json").read_text())
    write_json(tmp_path / "training/long.json", card | {"peak_reserved_bytes": 77})
    jobs = [planned_job("training", "long", 256, 1000, 50, peak=80), planned_job("merging", "long", 256, 1000, 5)]
    write_json(tmp_path / "plan.json", {"device": {"kind": "cuda", "name": "A100"}, "jobs": jobs})
    for name in ("train", "merge_adapter"):
        write_benchmark(tmp_path, f"{name}/long", 60, "2.0")
    training, merging = plan_check(sources_of(tmp_path))["rows"]
    assert (training["memory"], merging["memory"]) == ((80, 77), (1000, 2 * MIB))


def test_a_run_without_a_plan_has_no_such_section(tmp_path):
    assert plan_check(sources_of(tmp_path)) is None
    write_json(tmp_path / "plan.json", {"device": None, "jobs": [], "problem": "an unusual model"})
    assert plan_check(sources_of(tmp_path)) is None
