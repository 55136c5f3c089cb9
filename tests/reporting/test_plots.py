import re
from pathlib import Path

import matplotlib.pyplot as pyplot
import numpy
import pytest
from matplotlib.colors import to_hex
from sample_results import DATASETS, LABELS, PUBLISHED, add_longppl, draw_twice, write_cell, write_cells

from longqlora.reporting.figures import GRAY
from longqlora.reporting.plots import (
    LINE_HEIGHT,
    loss_by_position,
    plot_loss_by_position,
    plot_perplexity,
    upper_limit,
    write_direct_labels,
)
from longqlora.reporting.records import read_records


@pytest.fixture
def records(tmp_path) -> list[str]:
    return write_cells(tmp_path / "cells")


def test_the_panel_holds_the_best_system_but_not_a_perplexity_that_explodes(records):
    cells = read_records(records, LABELS)
    assert 9.02 < upper_limit(cells[cells["dataset_label"] == "PG19"]) < 2345


def test_the_plot_has_a_line_per_system_and_a_panel_per_set_and_is_reproducible(records, tmp_path):
    texts = draw_twice(lambda outputs: plot_perplexity(records, LABELS, PUBLISHED, outputs), tmp_path)
    assert {*DATASETS, "base", "Long &amp; 100 %", "Paper (published)"} <= texts
    assert texts & {"&gt;1000 ↑", ">1000 ↑"}


def test_longppl_has_a_panel_for_each_set(records, tmp_path):
    add_longppl(records, evaluator="base")
    texts = draw_twice(lambda outputs: plot_perplexity(records, LABELS, [], outputs), tmp_path)
    assert {*DATASETS, *(f"{name}, LongPPL" for name in DATASETS)} <= texts


def colors_of_lines(svg: Path) -> set[str]:
    return set(re.findall(r"stroke: (#\w+); stroke-width: 1", svg.read_text())) - {"#000000"}


def test_up_to_twenty_four_systems_have_colors_of_their_own(tmp_path):
    labels = {"system": {f"row{number}": f"row{number}" for number in range(24)}, "dataset": LABELS["dataset"]}
    records = [write_cell(tmp_path, label, "PG19", length, 9.0) for label in labels["system"] for length in (64, 128)]
    plot_perplexity(records, labels, [], [str(tmp_path / "plot.svg")])
    assert len(colors_of_lines(tmp_path / "plot.svg")) == 24


def test_figures_from_the_literature_are_grey(records, tmp_path):
    rows = [{"label": f"row {number}", "dataset": "PG19", "perplexity": {"64": 9.0, "256": 8.0}} for number in range(5)]
    plot_perplexity(records, LABELS, rows, [str(tmp_path / "plot.svg")])
    measured, gray = colors_of_lines(tmp_path / "plot.svg") - {to_hex(GRAY)}, to_hex(GRAY)
    assert len(measured) == 3
    assert gray in colors_of_lines(tmp_path / "plot.svg")


def labels_beside(labels: dict[str, float]) -> dict[str, float]:
    """Where labels are written beside lines that end at these values in a panel from 0 to 1."""
    figure = pyplot.figure()
    axes = figure.add_subplot(ylim=(0, 1))
    write_direct_labels(axes, labels, dict.fromkeys(labels, "black"))
    places = {text.get_text(): text.xy[1] for text in axes.texts}
    pyplot.close(figure)
    return places


def test_labels_stand_beside_their_lines_in_their_order_and_not_on_each_other():
    assert labels_beside({"a": 0.2, "b": 0.7}) == pytest.approx({"a": 0.2, "b": 0.7})
    crowded = labels_beside({"a": 0.97, "b": 0.98, "c": 0.99, "broken": 40.0})
    places = list(crowded.values())
    assert list(crowded) == ["a", "b", "c", "broken"]
    assert places[-1] == pytest.approx(1)
    assert numpy.diff(places).min() >= LINE_HEIGHT - 1e-9


@pytest.mark.parametrize(
    ("published", "has_legend"),
    [
        ([], False),
        ([{"label": "short", "dataset": "PG19", "perplexity": {"64": 9.0}}], True),  # ends before the right edge
        ([{"label": "x" * 40, "dataset": "Proof-pile", "perplexity": {"64": 9.0, "256": 8.0}}], True),
    ],
)
def test_a_legend_comes_only_where_lines_cannot_have_their_labels_beside_them(records, tmp_path, published, has_legend):
    plot_perplexity(records, LABELS, published, [str(tmp_path / "plot.svg")])
    assert ('id="legend_1"' in (tmp_path / "plot.svg").read_text()) == has_legend


def test_the_loss_by_position_is_a_mean_over_tokens_at_every_length(records):
    losses = loss_by_position(read_records(records, LABELS))
    assert sorted(losses["eval_length"].unique()) == [64, 128, 256]
    row = losses.query("label == 'base' and dataset_label == 'PG19' and eval_length == 64 and tokens_before == 8")
    assert row["mean_nll"].item() == pytest.approx(numpy.log(9.0) + 1 / 8)


def test_the_loss_by_position_is_plotted_at_the_longest_length(records, tmp_path):
    losses = loss_by_position(read_records(records, LABELS))
    texts = draw_twice(lambda outputs: plot_loss_by_position(losses, outputs), tmp_path)
    assert {"PG19, 256 tokens", "Proof-pile, 256 tokens", "base", "chat_model"} <= texts
