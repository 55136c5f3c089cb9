import numpy
import pandas
import pytest
from sample_results import DATASETS, LABELS, windows_of, write_cell, write_cells

from longqlora.reporting.comparisons import differences, gains_from_training, statistically_best
from longqlora.reporting.records import read_records


@pytest.fixture
def records(tmp_path) -> list[str]:
    return write_cells(tmp_path / "cells")


def test_all_pairs_of_systems_are_compared_with_their_intervals(records):
    found = differences(read_records(records, LABELS), windows_of(records))
    assert len(found) == 3 * len(DATASETS) * 3  # pairs, sets, lengths
    (row,) = found.query(
        "dataset_label == 'PG19' and eval_length == 128 and system == 'base' and other == 'Long & 100 %'"
    ).to_dict("records")
    assert row["difference"] == pytest.approx(numpy.log(8.0 / 8.5))
    assert row["perplexity_ratio"] == pytest.approx(8.0 / 8.5)
    assert row["low"] < row["difference"] < row["high"] < 0
    assert row["significant"]
    half = 2.09302 * row["standard_error"]  # Student's t with 19 degrees of freedom
    assert row["high"] - row["difference"] == pytest.approx(half, rel=1e-5)
    similar = found.query("eval_length == 64 and system == 'base' and other == 'Long & 100 %'")
    assert not similar["significant"].any()


def test_a_set_of_one_window_has_no_differences(tmp_path):
    records = [write_cell(tmp_path, label, "PG19", 64, value) for label, value in [("a", 8.0), ("b", 9.0)]]
    for path in windows_of(records):
        pandas.read_parquet(path).iloc[:1].to_parquet(path)
    assert differences(read_records(records, LABELS), windows_of(records)).empty


def test_the_best_are_the_best_and_those_not_significantly_different_from_it(records):
    cells = read_records(records, LABELS)
    best = statistically_best(cells, differences(cells, windows_of(records)))
    assert {(label, length) for label, dataset, length in best if dataset == "PG19"} == {
        ("base", 64), ("Long & 100 %", 64), ("base", 128), ("Long & 100 %", 256),
    }  # fmt: skip


def test_the_best_trained_row_is_compared_with_the_best_untrained_one_at_the_longest_length_within_their_context(tmp_path):
    perplexity = {
        "a": {128: 9.0, 256: 9.5},
        "b": {128: 8.0, 256: 9.0},
        "x": {128: 9.5, 256: 8.0},
        "x.rank-8": {128: 7.0, 256: 9.9},
    }
    places = [(label, length) for label, by_length in perplexity.items() for length in by_length]
    records = [write_cell(tmp_path, label, "PG19", length, perplexity[label][length]) for label, length in places]
    cells = read_records(records, LABELS)
    pairs = differences(cells, windows_of(records))
    rows = {"trained": ["x", "x.rank-8"], "untrained": ["a", "b"]}
    (gain,) = gains_from_training(cells, pairs, {256: rows}).to_dict("records")
    assert (gain["trained"], gain["untrained"], gain["eval_length"]) == ("x", "b", 256)
    assert (gain["trained_perplexity"], gain["untrained_perplexity"]) == (8.0, 9.0)
    assert gain["change"] == pytest.approx(8 / 9 - 1)
    (pair,) = pairs.query("eval_length == 256 and system == 'b' and other == 'x'").to_dict("records")
    assert gain["standard_error"] == pytest.approx(8 / 9 * pair["standard_error"])
    assert gain["significant"]
    (gain,) = gains_from_training(cells, pairs, {200: rows}).to_dict("records")  # 256 is beyond what they are extended to
    assert (gain["trained"], gain["untrained"], gain["eval_length"]) == ("x.rank-8", "b", 128)
    (gain,) = gains_from_training(cells, pairs, {256: {"trained": ["a"], "untrained": ["x"]}}).to_dict("records")
    assert gain["change"] == pytest.approx(9.5 / 8 - 1)  # training made it worse
    assert gains_from_training(cells, pairs, {64: rows}).empty
    assert gains_from_training(cells, pairs.iloc[:0], {256: rows}).empty  # of one window, or other windows


def test_what_does_not_differ_from_a_second_best_is_not_among_the_best():
    cells = pandas.DataFrame({"label": ["a", "b", "c"], "perplexity": [8.0, 8.1, 8.2], "has_own_tokenizer": False})
    cells = cells.assign(dataset_label="PG19", eval_length=64)
    pairs = pandas.DataFrame(
        [("a", "b", False), ("a", "c", True), ("b", "c", False)], columns=["system", "other", "significant"]
    ).assign(dataset_label="PG19", eval_length=64)
    assert statistically_best(cells, pairs) == {("a", "PG19", 64), ("b", "PG19", 64)}
