import re

import pandas
import pytest
from sample_results import LABELS, draw_twice, texts_of, write_retrieval_cells

from longqlora.reporting.retrieval_report import plot_retrieval, read_retrieval, render_retrieval


@pytest.fixture
def cells(tmp_path) -> pandas.DataFrame:
    return read_retrieval(write_retrieval_cells(tmp_path / "retrieval"), LABELS)


def test_the_table_has_a_part_for_each_task(cells, tmp_path):
    render_retrieval(cells, csv=str(tmp_path / "r.csv"), markdown=str(tmp_path / "r.md"))
    lines = pandas.read_csv(tmp_path / "r.csv")
    assert len(lines) == 4 * 2 * 2
    row = lines.query("label == 'Long & 100 %' and eval_length == 256 and task == 'passkey' and depth == 1")
    assert row["accuracy"].item() == 0.4
    assert row["chat_template"].item()
    assert "what a model said" not in (tmp_path / "r.csv").read_text()
    text = (tmp_path / "r.md").read_text()
    assert "**passkey**, mean over 10 questions at 2 depths" in text
    assert "**multi key**, mean over" in text
    assert text.endswith("\n\nQuestions in the chat template of the model: Long & 100 %, chat_model.\n")
    assert re.search(r"\| Long & 100 % +\| +100 % +\| +60 % +\|", text)


def test_the_plot_has_a_column_per_system_and_a_row_per_task(cells, tmp_path):
    texts = draw_twice(lambda outputs: plot_retrieval(cells, outputs), tmp_path)
    assert {"base", "Long &amp; 100 %", "chat_model", "multi key", "passkey", "80", "12"} <= texts


def test_more_systems_than_fit_in_a_row_are_drawn_below(cells, tmp_path):
    many = pandas.concat([cells[cells["label"] == "base"].assign(label=f"system {number}") for number in range(8)])
    plot_retrieval(many, [str(tmp_path / "r.svg")])
    svg = (tmp_path / "r.svg").read_text()
    assert texts_of(tmp_path / "r.svg") >= {f"system {number}" for number in range(8)}
    assert svg.count("<!-- passkey -->") == 2  # at the left of each row of four
    width = float(re.search(r'viewBox="0 0 ([\d.]+) ', svg).group(1))
    assert width < 72 * 10
