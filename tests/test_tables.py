import json
from pathlib import Path

import pandas
import pytest

from longqlora.plots import frame_top, plot_perplexity
from longqlora.tables import format_perplexity, perplexity_table, published_records, read_records, render_table

VALUES = {  # the base breaks beyond 128 tokens
    "base": {"PG19": {64: 9.0, 128: 8.0, 256: 2345.0}, "Proof-pile": {64: 4.0, 128: 3.0, 256: 60.0}},
    "Long & better": {"PG19": {64: 9.2, 128: 8.1, 256: 7.9}, "Proof-pile": {64: 4.1, 128: 3.1, 256: 2.9}},
}
PUBLISHED = [{"label": "Paper", "dataset": "PG19", "perplexity": {"64": 9.1, "256": 8.0}}]


@pytest.fixture
def records(tmp_path):
    paths = []
    for label, datasets in VALUES.items():
        for dataset, by_length in datasets.items():
            for length, value in by_length.items():
                path = tmp_path / f"{len(paths)}.json"
                protocol = {"window": length, "stride": length, "precision": "nf4", "has_own_tokenizer": False}
                cell = {"label": label, "dataset_label": dataset, "context_length": length, "perplexity": value}
                path.write_text(json.dumps(cell | protocol))
                paths.append(str(path))
    return paths


def test_every_cell_stands_in_its_row_and_column(records):
    table = perplexity_table(read_records(records))
    for label, datasets in VALUES.items():
        for dataset, by_length in datasets.items():
            for length, value in by_length.items():
                assert table.loc[label, (dataset, length)] == value
    assert list(table.index) == list(VALUES)
    assert list(table.columns) == [(d, n) for d in ("PG19", "Proof-pile") for n in (64, 128, 256)]


@pytest.mark.parametrize(("value", "text"), [(7.956, "7.96"), (38.8, "38.80"), (1000.1, ">1000"), (float("nan"), "–")])
def test_numbers_are_written_as_in_the_paper(value, text):
    assert format_perplexity(value) == text


def test_the_three_files_hold_the_table(records, tmp_path):
    csv, markdown, latex = (tmp_path / f"t.{suffix}" for suffix in ("csv", "md", "tex"))
    render_table(records, PUBLISHED, str(csv), str(markdown), str(latex))
    cells = pandas.read_csv(csv)
    assert cells.query("label == 'base' and dataset_label == 'PG19' and context_length == 256")["perplexity"].item() == 2345.0
    lines = markdown.read_text().splitlines()
    assert [part.strip() for part in lines[4].split("|")[1:-1]] == ["base", "9.00", "8.00", ">1000"]
    assert any("Paper (published)" in line and "–" in line for line in lines)
    assert "window = stride; precision nf4" in lines[-1]
    assert r"Long \& better & 9.20 & 8.10 & 7.90" in latex.read_text()


def test_the_frame_holds_the_best_system_and_not_the_one_that_breaks(records):
    cells = read_records(records)
    pg19 = cells[cells["dataset_label"] == "PG19"]
    assert 9.2 < frame_top(pg19) < 2345


def test_the_plot_has_a_line_a_system_and_a_panel_a_set_and_is_reproducible(records, tmp_path):
    first, second, png = tmp_path / "a.svg", tmp_path / "b.svg", tmp_path / "a.png"
    plot_perplexity(records, PUBLISHED, [str(first), str(png)])
    plot_perplexity(records, PUBLISHED, [str(second)])
    assert first.read_bytes() == second.read_bytes()
    assert png.read_bytes().startswith(b"\x89PNG")
    drawing = first.read_text()
    for text in ("PG19", "Proof-pile", "base", "Long &amp; better", "Paper (published)"):
        assert f"<!-- {text} -->" in drawing
    assert "&gt;1000 ↑" in drawing or ">1000 ↑" in drawing


def test_published_rows_are_marked(records):
    assert published_records(PUBLISHED)["label"].tolist() == ["Paper (published)"] * 2
    assert published_records([]).empty


def test_a_row_with_its_own_tokenizer_is_named_below_the_table(records, tmp_path):
    own = json.loads(Path(records[-1]).read_text()) | {"label": "MPT", "has_own_tokenizer": True}
    (tmp_path / "own.json").write_text(json.dumps(own))
    outputs = [str(tmp_path / f"t.{suffix}") for suffix in ("csv", "md", "tex")]
    render_table([*records, str(tmp_path / "own.json")], [], *outputs)
    assert "Per token of its own tokenizer, not of the base model's: MPT." in (tmp_path / "t.md").read_text()
