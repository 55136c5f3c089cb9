import json
import re
from pathlib import Path

import numpy
import pandas
import pytest

from longqlora.reporting.plots import frame_top, plot_ablation, plot_loss_by_position, plot_perplexity, plot_retrieval
from longqlora.reporting.tables import (
    differences,
    format_perplexity,
    published_records,
    read_records,
    render_ablation,
    render_retrieval,
    render_table,
)

CONTEXT = 128  # of the base, which breaks beyond it
PERPLEXITY = {
    "base": {64: 9.0, 128: 8.0, 256: 2345.0},
    "Long & 100 %": {64: 9.02, 128: 8.5, 256: 7.9},
    "chat_model": {64: 12.0, 128: 11.0, 256: 10.0},
}
ALIKE = {("Long & 100 %", 64)}  # cannot be told from the best
DATASETS = ["PG19", "Proof-pile"]
SYSTEMS = [*PERPLEXITY, "MPT & co", "a", "b", "x", "x.rank-8"]
LABELS = {"system": {name.split()[0].lower(): name for name in SYSTEMS}, "dataset": {name: name for name in DATASETS}}
PUBLISHED = [{"label": "Paper", "dataset": "PG19", "perplexity": {"64": 9.1, "256": 8.0}}]
NUM_WINDOWS, NUM_SCORED = 20, 10


def window_losses(label: str, length: int, perplexity: float) -> pandas.DataFrame:
    """Windows whose mean is the perplexity: what is hard for all, and what is this system's own."""
    hard = numpy.random.default_rng(length).normal(0, 0.5, NUM_WINDOWS)
    own = numpy.random.default_rng(len(label)).normal(0, 0.1 if (label, length) in ALIKE else 0.001, NUM_WINDOWS)
    nll = numpy.log(perplexity) + (hard - hard.mean()) + (own - own.mean())
    frame = {"document": 0, "begin": numpy.arange(NUM_WINDOWS) * length, "num_scored": NUM_SCORED, "nll": NUM_SCORED * nll}
    return pandas.DataFrame(frame)


def write_cell(folder: Path, label: str, dataset: str, length: int, perplexity: float, **changes) -> str:
    """A record of perplexity and its windows; the path of the record."""
    path = folder / f"{len(list(folder.glob('*.json')))}.json"
    window_losses(label, length, perplexity).to_parquet(path.with_suffix(".parquet"))
    positions = [1, 2, 8, length]
    cell = {
        "system": label.split()[0].lower(), "dataset": dataset, "eval_length": length,
        "perplexity": perplexity, "mean_nll": numpy.log(perplexity), "standard_error": 0.01, "standard_error_units": "windows",
        "protocol": "exact", "window": length, "stride": length, "precision": "nf4", "attention": "full",
        "has_own_tokenizer": False, "is_within_context": label != "base" or length <= CONTEXT, "dataset_warning": None,
        "loss_by_position": {
            "tokens_before": positions, "num_scored": [10] * 4, "nll": [10 * (numpy.log(perplexity) + 1 / n) for n in positions]
        },
    }  # fmt: skip
    path.write_text(json.dumps(cell | changes))
    return str(path)


def write_retrieval(folder: Path, label: str, length: int, shares: dict[str, list[float]]) -> str:
    path = folder / f"{label.split()[0]}-{length}.json"
    cells = [
        {"task": task, "depth": depth, "accuracy": share, "samples": 5}
        for task, by_depth in shares.items()
        for depth, share in zip((0, 1), by_depth, strict=True)
    ]
    accuracy = numpy.mean([cell["accuracy"] for cell in cells])
    stamp = {"rope_scaling": "linear", "rope_factor": 2.0, "target_context": 256}
    cell = {"system": label.split()[0].lower(), "eval_length": length, "accuracy": accuracy, "cells": cells}
    path.write_text(json.dumps(cell | stamp))
    return str(path)


@pytest.fixture
def records(tmp_path) -> list[str]:
    (tmp_path / "cells").mkdir()
    return [
        write_cell(tmp_path / "cells", label, dataset, length, value)
        for label, by_length in PERPLEXITY.items()
        for dataset in DATASETS
        for length, value in by_length.items()
    ]


@pytest.fixture
def retrieval(tmp_path) -> list[str]:
    """The second system is fluent at 256 and finds a third there; the third is not fluent and finds nothing."""
    (tmp_path / "found").mkdir()
    shares = {
        ("base", 64): {"passkey": [1, 1], "multi_key": [1, 0.8]},
        ("Long & 100 %", 64): {"passkey": [1, 1], "multi_key": [1, 1]},
        ("Long & 100 %", 256): {"passkey": [0.8, 0.4], "multi_key": [0, 0.12]},
        ("chat_model", 256): {"passkey": [0, 0], "multi_key": [0, 0]},
    }
    return [write_retrieval(tmp_path / "found", *place, found) for place, found in shares.items()]


@pytest.fixture
def render(tmp_path):
    def run(records, retrieval=(), published=()) -> dict[str, Path]:
        paths = {name: tmp_path / f"t.{name}" for name in ("csv", "markdown", "latex", "differences_csv")}
        render_table(
            records=records,
            labels=LABELS,
            windows=[record.replace(".json", ".parquet") for record in records],
            retrieval=list(retrieval),
            published=list(published),
            **{name: str(path) for name, path in paths.items()},
        )
        return paths

    return run


def rows_of(markdown: Path) -> dict[str, list[str]]:
    """Cells by label of the first table."""
    lines = markdown.read_text().split("\n\n")[1].splitlines()
    cells = [[part.strip() for part in line.split("|")[1:-1]] for line in lines]
    return {label: row for label, *row in [cells[0], *cells[2:]]}


def caption(markdown: Path) -> str:
    return markdown.read_text().splitlines()[-1]


# --- the table of perplexity -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "text"), [(7.956, "7.96"), (38.8, "38.80"), (1000.1, ">1000"), (float("nan"), "–")])
def test_numbers_are_written_as_in_the_paper(value, text):
    assert format_perplexity(value) == text


def test_every_cell_stands_in_its_row_and_column_with_its_error(records, render):
    assert rows_of(render(records)["markdown"]) == {
        "system": ["64", "128", "256"],
        "base": ["**9.00** ± 0.09", "**8.00** ± 0.08", ">1000†"],
        "Long & 100 %": ["**9.02** ± 0.09", "8.50 ± 0.09", "**7.90** ± 0.08"],
        "chat_model": ["12.00 ± 0.12", "11.00 ± 0.11", "10.00 ± 0.10"],
    }
    assert render(records)["markdown"].read_text().count("**Proof-pile**") == 1


def test_without_a_difference_that_is_known_the_best_alone_is_bold(records, render, tmp_path):
    """Systems that read other windows cannot be compared."""
    for number, record in enumerate(records):
        windows = pandas.read_parquet(record.replace(".json", ".parquet"))
        windows.assign(begin=windows["begin"] + number).to_parquet(record.replace(".json", ".parquet"))
    paths = render(records)
    assert rows_of(paths["markdown"])["Long & 100 %"] == ["9.02 ± 0.09", "8.50 ± 0.09", "**7.90** ± 0.08"]
    assert pandas.read_csv(paths["differences_csv"]).empty


def test_the_caption_says_what_the_marks_mean_and_only_of_those_that_are_there(records, render):
    text = caption(render(records)["markdown"])
    for sentence in ("weights: nf4", "± is the standard error, over windows", "† beyond the model's context", "95 % interval"):
        assert sentence in text
    assert "Found" not in text
    assert "⚠" not in text
    within = [record for record in records if json.loads(Path(record).read_text())["is_within_context"]]
    assert "†" not in render(within)["markdown"].read_text()


@pytest.mark.parametrize(
    ("protocol", "sentence"),
    [
        ({"protocol": "exact"}, "every token of a document but its first is scored once"),
        ({"protocol": "exact", "stride": 32}, "Stride 32."),
        ({"protocol": "longqlora"}, "protocol of LongQLoRA: windows one after the other"),
        ({"protocol": "longlora", "stride": 256}, "protocol of LongLoRA: a window every 256 tokens"),
    ],
)
def test_the_caption_names_the_protocol(tmp_path, render, protocol, sentence):
    record = write_cell(tmp_path, "base", "PG19", 64, 9.0, **protocol)
    assert sentence in caption(render([record])["markdown"])


def test_what_is_fluent_and_finds_nothing_is_warned_of(records, retrieval, render):
    paths = render(records, retrieval)
    rows = rows_of(paths["markdown"])
    assert rows["system"] == ["64", "found at 64", "128", "256", "found at 256"]
    assert rows["base"][1::3] == ["95 %", "–"]
    assert rows["Long & 100 %"][1::3] == ["100 %", "33 % ⚠"]
    assert rows["chat_model"][1::3] == ["–", "0 %"]  # whose perplexity flatters nobody
    text = caption(paths["markdown"])
    assert "Found: retrieval accuracy, the mean over depths and tasks (multi key, passkey)" in text
    assert "⚠ perplexity is good here (at most 1.1 times the best), yet less than 50 % is found again" in text
    cells = pandas.read_csv(paths["csv"])
    assert cells.query("label == 'base' and eval_length == 64")["retrieval_accuracy"].tolist() == [0.95, 0.95]


def test_the_csv_has_all_of_every_record(records, render):
    cells = pandas.read_csv(render(records, published=PUBLISHED)["csv"])
    assert cells.query("label == 'base' and dataset_label == 'PG19' and eval_length == 256")["perplexity"].item() == 2345.0
    assert len(cells) == len(records) + 2
    assert {"standard_error", "stride", "precision", "is_within_context"} <= set(cells)


def test_published_rows_are_marked_and_compete_with_none(records, render):
    assert published_records([]).empty
    paths = render(records, published=[PUBLISHED[0] | {"perplexity": {"64": 1.0, "256": 8.0}}])
    rows = rows_of(paths["markdown"])
    assert rows["Paper (published)"] == ["1.00", "–", "8.00"]
    assert rows["base"][0].startswith("**")


def test_a_row_with_its_own_tokenizer_is_named_and_does_not_compete(records, render, tmp_path):
    own = write_cell(tmp_path / "cells", "MPT & co", "PG19", 64, 2.0, has_own_tokenizer=True)
    paths = render([*records, own])
    assert "Per token of its own tokenizer, not of the base model's, and not compared: MPT & co." in caption(paths["markdown"])
    rows = rows_of(paths["markdown"])
    assert rows["MPT & co"][0] == "2.00 ± 0.02"
    assert rows["base"][0] == "**9.00** ± 0.09"


def test_what_is_suspicious_of_a_set_stands_below_the_table(tmp_path, render):
    record = write_cell(tmp_path, "base", "PG19", 64, 9.0, dataset_warning="x_y.bin: 60% come back & more")
    paths = render([record])
    assert caption(paths["markdown"]).endswith("Warning: x_y.bin: 60% come back & more")
    assert r"Warning: x\_y.bin: 60\% come back \& more" in paths["latex"].read_text()


def test_latex_holds_the_same_cells_and_nothing_that_it_would_take_for_a_command(records, retrieval, render, tmp_path):
    own = write_cell(tmp_path / "cells", "MPT & co", "PG19", 64, 2.0, has_own_tokenizer=True)
    text = render([*records, own], retrieval, PUBLISHED)["latex"].read_text()
    row = next(line for line in text.splitlines() if line.startswith(r"Long \& 100 \%"))
    assert [cell.strip() for cell in re.split(r"(?<!\\)&", row.removesuffix(r" \\"))][:6] == [
        r"Long \& 100 \%", r"\textbf{9.02} $\pm$ 0.09", r"100\,\%", r"8.50 $\pm$ 0.09", r"\textbf{7.90} $\pm$ 0.08",
        r"33\,\% (!)",
    ]  # fmt: skip
    assert r"$>$1000\textsuperscript{\textdagger}" in text
    assert r"chat\_model" in text
    assert not re.search(r"(?<!\\)%", text)
    assert not re.search(r"(?<!\\)_", text.replace(r"\label{tab:perplexity}", ""))
    widths = {len(re.split(r"(?<!\\)&", line)) for line in text.splitlines() if line.endswith(r"\\") and "multicol" not in line}
    assert widths == {1 + 2 * 5}
    beginning = text[: text.index(r"\begin{tabular}")]
    assert not re.search(r"(?<!\\)&", beginning)
    assert not set("†⚠±") & set(text)


def test_differences_of_all_pairs_are_written_with_their_intervals(records, render):
    found = pandas.read_csv(render(records)["differences_csv"])
    assert len(found) == 3 * len(DATASETS) * 3  # pairs, sets, lengths
    (row,) = found.query(
        "dataset_label == 'PG19' and eval_length == 128 and system == 'base' and other == 'Long & 100 %'"
    ).to_dict("records")
    assert row["difference"] == pytest.approx(numpy.log(8.0 / 8.5))
    assert row["perplexity_ratio"] == pytest.approx(8.0 / 8.5)
    assert row["low"] < row["difference"] < row["high"] < 0
    assert row["significant"]
    half = 2.093 * row["standard_error"]  # Student's t of 19 degrees of freedom
    assert row["high"] - row["difference"] == pytest.approx(half, rel=1e-3)
    alike = found.query("eval_length == 64 and system == 'base' and other == 'Long & 100 %'")
    assert not alike["significant"].any()


def test_a_set_of_one_window_has_no_differences(tmp_path):
    paths = [write_cell(tmp_path, label, "PG19", 64, value) for label, value in [("a", 8.0), ("b", 9.0)]]
    windows = [path.replace(".json", ".parquet") for path in paths]
    for path in windows:
        pandas.read_parquet(path).iloc[:1].to_parquet(path)
    assert differences(read_records(paths, LABELS), windows).empty


# --- other tables ----------------------------------------------------------------------------------------------------------


def test_the_table_of_retrieval_has_a_part_for_each_task(retrieval, tmp_path):
    render_retrieval(records=retrieval, labels=LABELS, csv=str(tmp_path / "r.csv"), markdown=str(tmp_path / "r.md"))
    cells = pandas.read_csv(tmp_path / "r.csv")
    assert len(cells) == 4 * 2 * 2
    row = cells.query("label == 'Long & 100 %' and eval_length == 256 and task == 'passkey' and depth == 1")
    assert row["accuracy"].item() == 0.4
    text = (tmp_path / "r.md").read_text()
    assert "**passkey**, mean of 10 questions over 2 depths" in text
    assert "**multi key**, mean of" in text
    assert re.search(r"\| Long & 100 % +\| +100 % +\| +60 % +\|", text)


@pytest.fixture
def ablation(tmp_path) -> dict:
    """Two ranks, each at two lengths; records, and the grid as the configuration has it."""
    (tmp_path / "grid").mkdir()
    rows = {"x.rank-8": {"rank": 8}, "x": {"rank": 16}}
    records = [
        write_cell(tmp_path / "grid", f"row of {system}", "PG19", length, value, system=system)
        for system, values in [("x.rank-8", [9.0, 8.0]), ("x", [8.5, 7.6])]
        for length, value in zip((64, 128), values, strict=True)
    ]
    return {"records": records, "ablation": {"label": "Rank & file", "axes": ["rank"], "rows": rows}}


def test_the_table_of_a_grid_has_a_row_for_each_combination(ablation, tmp_path):
    paths = {name: str(tmp_path / f"a.{name}") for name in ("csv", "markdown", "latex")}
    render_ablation(
        **ablation, labels=LABELS, windows=[path.replace(".json", ".parquet") for path in ablation["records"]], **paths
    )
    text = Path(paths["markdown"]).read_text()
    assert text.startswith("# Rank & file\n")
    assert re.search(r"\| LoRA rank 8 +\| +9\.00 ± 0\.09 +\| +8\.00 ± 0\.08 +\|", text)
    assert re.search(r"\| LoRA rank 16 +\| +\*\*8\.50\*\* ± 0\.09 +\| +\*\*7\.60\*\* ± 0\.08 +\|", text)
    assert pandas.read_csv(paths["csv"])["rank"].tolist() == [8, 8, 16, 16]
    assert r"\caption{Rank \& file. Perplexity" in Path(paths["latex"]).read_text()


# --- plots -----------------------------------------------------------------------------------------------------------------


def test_the_frame_holds_the_best_system_and_not_the_one_that_breaks(records):
    cells = read_records(records, LABELS)
    assert 9.02 < frame_top(cells[cells["dataset_label"] == "PG19"]) < 2345


def comments(svg: Path) -> set[str]:
    """The texts of a drawing."""
    return set(re.findall(r"<!-- (.*?) -->", svg.read_text()))


def draw_twice(draw, folder: Path) -> set[str]:
    """Draw into two SVG files and a PNG; the texts of the drawing."""
    first, second, png = folder / "a.svg", folder / "b.svg", folder / "a.png"
    draw([str(first), str(png)])
    draw([str(second)])
    assert first.read_bytes() == second.read_bytes()
    assert png.read_bytes().startswith(b"\x89PNG")
    return comments(first)


def test_the_plot_has_a_line_a_system_and_a_panel_a_set_and_is_reproducible(records, tmp_path):
    texts = draw_twice(lambda outputs: plot_perplexity(records, LABELS, PUBLISHED, outputs), tmp_path)
    assert {*DATASETS, "base", "Long &amp; 100 %", "Paper (published)"} <= texts
    assert texts & {"&gt;1000 ↑", ">1000 ↑"}


def test_the_loss_by_position_is_plotted_at_the_longest_length_and_written_for_all(records, tmp_path):
    csv = tmp_path / "l.csv"
    texts = draw_twice(lambda outputs: plot_loss_by_position(records, LABELS, str(csv), outputs), tmp_path)
    assert {"PG19, 256 tokens", "Proof-pile, 256 tokens", "base", "chat_model"} <= texts
    losses = pandas.read_csv(csv)
    assert sorted(losses["eval_length"].unique()) == [64, 128, 256]
    row = losses.query("label == 'base' and dataset_label == 'PG19' and eval_length == 64 and tokens_before == 8")
    assert row["mean_nll"].item() == pytest.approx(numpy.log(9.0) + 1 / 8)


def test_the_plot_of_retrieval_has_a_column_a_system_and_a_row_a_task(retrieval, tmp_path):
    texts = draw_twice(lambda outputs: plot_retrieval(retrieval, LABELS, outputs), tmp_path)
    assert {"base", "Long &amp; 100 %", "chat_model", "multi key", "passkey", "80", "12"} <= texts


@pytest.mark.parametrize("axes", [["rank"], ["rope_scaling"]])
def test_the_plot_of_a_grid_is_against_numbers_where_they_are(ablation, tmp_path, axes):
    values = {"rank": [8, 16], "rope_scaling": ["linear", "yarn"]}[axes[0]]
    grid = ablation["ablation"] | {
        "axes": axes, "rows": {name: {axes[0]: value} for name, value in zip(("x.rank-8", "x"), values, strict=True)}
    }  # fmt: skip
    texts = draw_twice(lambda outputs: plot_ablation(ablation["records"], grid, LABELS, outputs), tmp_path)
    if axes == ["rank"]:
        assert {"LoRA rank", "64 tokens", "128 tokens"} <= texts
    else:
        assert {"context length (tokens)", "RoPE scaling linear", "RoPE scaling yarn"} <= texts
