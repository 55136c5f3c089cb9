import re

import numpy
import pytest
from sample_results import DATASETS, LABELS, PUBLISHED, add_longppl, draw_twice, write_cells

from longqlora.reporting.plots import loss_by_position, plot_loss_by_position, plot_perplexity, upper_limit
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


def test_up_to_twenty_systems_have_colors_of_their_own(records, tmp_path):
    rows = [{"label": f"row {number}", "dataset": "PG19", "perplexity": {"64": 9.0, "256": 8.0}} for number in range(17)]
    plot_perplexity(records, LABELS, rows, [str(tmp_path / "plot.svg")])
    markers = re.findall(r"stroke: (#\w+); stroke-width: 1", (tmp_path / "plot.svg").read_text())
    assert len(set(markers) - {"#000000"}) == 20


def test_the_loss_by_position_is_a_mean_over_tokens_at_every_length(records):
    losses = loss_by_position(read_records(records, LABELS))
    assert sorted(losses["eval_length"].unique()) == [64, 128, 256]
    row = losses.query("label == 'base' and dataset_label == 'PG19' and eval_length == 64 and tokens_before == 8")
    assert row["mean_nll"].item() == pytest.approx(numpy.log(9.0) + 1 / 8)


def test_the_loss_by_position_is_plotted_at_the_longest_length(records, tmp_path):
    losses = loss_by_position(read_records(records, LABELS))
    texts = draw_twice(lambda outputs: plot_loss_by_position(losses, outputs), tmp_path)
    assert {"PG19, 256 tokens", "Proof-pile, 256 tokens", "base", "chat_model"} <= texts
