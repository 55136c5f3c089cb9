from sample_report import SCRIPT, sources_of, write_benchmark, write_evaluation, write_training

from longqlora.reporting.report_content import collect, cost


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
        {"stage": "training", "jobs": 2, "seconds": 90, "longest": 60, "memory": 2048},
        {"stage": "perplexity", "jobs": 1, "seconds": 5, "longest": 5, "memory": 1024},
        {"stage": "tables and plots", "jobs": 1, "seconds": 1, "longest": 1, "memory": 1024},
    ]


def test_the_whole_configuration_and_the_digests_are_there(tmp_path):
    write_evaluation(tmp_path)
    write_training(tmp_path)
    found = collect(sources_of(tmp_path, checkout="v0.2.0-3-gabc"))["provenance"]
    assert "seed: 1\n" in found["configuration"]
    assert found["facts"]["commit of the report's code"] == ["v0.2.0-3-gabc"]
    assert found["facts"]["training data"] == ["corpus.bin, SHA-256 " + "ab" * 32]
    assert found["files"][0]["sha256"] == "cd" * 32
