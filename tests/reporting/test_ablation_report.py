import re
from pathlib import Path

import pandas
import pytest
from sample_results import LABELS, draw_twice, windows_of, write_cell

from longqlora.config.settings import Ablation
from longqlora.reporting.ablation_report import name_of_cell, plot_ablation, read_ablation, render_ablation


@pytest.fixture
def records(tmp_path) -> list[str]:
    """Two systems, each at two lengths."""
    (tmp_path / "grid").mkdir()
    return [
        write_cell(tmp_path / "grid", f"row of {system}", "PG19", length, value, system=system)
        for system, values in [("x.rank-8", [9.0, 8.0]), ("x", [8.5, 7.6])]
        for length, value in zip((64, 128), values, strict=True)
    ]


def read_grid(records: list[str], rows: dict[str, dict]) -> pandas.DataFrame:
    axes = list(rows["x"])
    return read_ablation(records, Ablation(label="Rank & file", axes=axes, rows=rows), LABELS)


def test_a_cell_is_named_by_its_settings():
    assert name_of_cell({"rank": 8, "evaluation_attention": "shifted_sparse"}) == (
        "LoRA rank 8, attention in evaluation shifted sparse"
    )


def test_the_table_has_a_row_per_combination(records, tmp_path):
    paths = {name: str(tmp_path / f"a.{name}") for name in ("csv", "markdown", "latex")}
    cells = read_grid(records, {"x.rank-8": {"rank": 8}, "x": {"rank": 16}})
    render_ablation(cells, windows_of(records), "Rank & file", **paths)
    text = Path(paths["markdown"]).read_text()
    assert text.startswith("# Rank & file\n")
    assert re.search(r"\| LoRA rank 8 +\| +9\.00 ± 0\.09 +\| +8\.00 ± 0\.08 +\|", text)
    assert re.search(r"\| LoRA rank 16 +\| +\*\*8\.50\*\* ± 0\.09 +\| +\*\*7\.60\*\* ± 0\.08 +\|", text)
    assert pandas.read_csv(paths["csv"])["rank"].tolist() == [8, 8, 16, 16]
    assert r"\caption{Rank \& file. Perplexity" in Path(paths["latex"]).read_text()


def test_the_plot_is_against_a_numeric_axis(records, tmp_path):
    cells = read_grid(records, {"x.rank-8": {"rank": 8}, "x": {"rank": 16}})
    texts = draw_twice(lambda outputs: plot_ablation(cells, ["rank"], outputs), tmp_path)
    assert {"LoRA rank", "64 tokens", "128 tokens"} <= texts


def test_the_plot_is_against_the_context_length_if_the_axis_is_not_numeric(records, tmp_path):
    cells = read_grid(records, {"x.rank-8": {"rope_scaling": "linear"}, "x": {"rope_scaling": "yarn"}})
    texts = draw_twice(lambda outputs: plot_ablation(cells, ["rope_scaling"], outputs), tmp_path)
    assert {"context length (tokens)", "RoPE scaling linear", "RoPE scaling yarn"} <= texts
