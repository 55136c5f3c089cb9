import json
import re
from pathlib import Path

import pandas
import pytest
from sample_results import LABELS, PUBLISHED, add_longppl, windows_of, write_cell, write_cells, write_retrieval_cells

from longqlora.reporting.notation import format_perplexity, markdown_table
from longqlora.reporting.records import published_records
from longqlora.reporting.tables import read_results, render_table


@pytest.fixture
def records(tmp_path) -> list[str]:
    return write_cells(tmp_path / "cells")


@pytest.fixture
def retrieval(tmp_path) -> list[str]:
    return write_retrieval_cells(tmp_path / "retrieval")


@pytest.fixture
def render(tmp_path):
    def run(records, retrieval=(), published=(), base=None, extended=(), choices=()) -> dict[str, Path]:
        paths = {name: tmp_path / f"t.{name}" for name in ("csv", "markdown", "latex", "differences_csv")}
        results = read_results(
            records=records,
            windows=windows_of(records),
            retrieval=list(retrieval),
            choices=dict(choices),
            labels=LABELS,
            published=list(published),
            base=base,
            extended=dict(extended),
        )
        render_table(results, **{name: str(path) for name, path in paths.items()})
        return paths

    return run


def rows_of(markdown: Path) -> dict[str, list[str]]:
    """Cells by label of the first table."""
    lines = markdown.read_text().split("\n\n")[1].splitlines()
    cells = [[part.strip() for part in line.split("|")[1:-1]] for line in lines]
    return {label: row for label, *row in [cells[0], *cells[2:]]}


def caption_items(markdown: Path) -> list[str]:
    """The list below the tables."""
    lines = markdown.read_text().split("\n\n")[-1].splitlines()
    assert all(line.startswith("- ") for line in lines)
    return [line.removeprefix("- ") for line in lines]


def caption(markdown: Path) -> str:
    return " ".join(caption_items(markdown))


@pytest.mark.parametrize(("value", "text"), [(7.956, "7.96"), (38.8, "38.80"), (1000.1, ">1000"), (float("nan"), "–")])
def test_numbers_are_written_as_in_the_paper(value, text):
    assert format_perplexity(value) == text


def test_every_cell_is_in_its_row_and_column_with_its_standard_error(records, render):
    assert rows_of(render(records)["markdown"]) == {
        "system": ["64", "128", "256"],
        "base": ["**9.00** ± 0.09", "**8.00** ± 0.08", ">1000†"],
        "Long & 100 %": ["**9.02** ± 0.09", "8.50 ± 0.09", "**7.90** ± 0.08"],
        "chat_model": ["12.00 ± 0.12", "11.00 ± 0.11", "10.00 ± 0.10"],
    }
    assert render(records)["markdown"].read_text().count("**Proof-pile**") == 1


@pytest.mark.parametrize(
    ("target", "trained", "untrained", "found"),
    [
        (
            256,
            "long",
            "chat_model",
            "(Long & 100 %: 7.90) is 21.0 ± 0.0 % lower than that of the best untrained one (chat_model: 10.00)",
        ),
        (128, "long", "base", "(Long & 100 %: 8.50) is 6.3 ± 0.0 % higher than that of the best untrained one (base: 8.00)"),
        (64, "long", "base", "(Long & 100 %: 9.02) is not significantly different (+0.2 ± 2.2 %) from that of the best"),
    ],
)
def test_the_caption_says_what_training_added(records, render, target, trained, untrained, found):
    paths = render(records, extended={target: {"trained": [trained], "untrained": [untrained]}})
    begin = (
        f"What training added at {target} tokens on PG19: of the rows extended to {target} tokens, the perplexity of the best"
    )
    assert caption(paths["markdown"]).startswith(begin)
    assert found in caption(paths["markdown"])
    assert caption(paths["markdown"]).count("What training added") == 2  # for each evaluation set
    assert r"best trained one (Long \& 100 \%: " in paths["latex"].read_text()
    assert "What training added" not in caption(render(records)["markdown"])


def test_the_caption_says_which_scaling_was_chosen(records, render, tmp_path):
    losses = {"linear": {"mean_nll": 4.0}, "yarn": {"mean_nll": 3.5}}
    choice = {"chosen": "yarn", "tokens": 16384, "precision": "nf4", "scalings": losses}
    (tmp_path / "choice.json").write_text(json.dumps(choice))
    paths = render(records, choices={str(tmp_path / "choice.json"): ["long", "chat_model"]})
    assert (
        "RoPE scaling of Long & 100 %; chat_model: yarn, which has the lowest loss before training, on 16384 tokens of the "
        "training data in precision nf4 (yarn 3.50, linear 4.00)."
    ) in caption(paths["markdown"])
    assert r"RoPE scaling of Long \& 100 \%; chat\_model: yarn" in paths["latex"].read_text()


def test_the_price_at_short_lengths_is_the_paired_change_of_the_perplexity_in_the_bases_context(records, render):
    paths = render(records, base="base")
    rows = rows_of(paths["markdown"])
    assert rows["system"] == ["64", "128", "256", "change at 128"]  # 256 is beyond the base's context
    assert {label: row[3] for label, row in rows.items() if label != "system"} == {
        "base": "–",
        "Long & 100 %": "+6.3 ± 0.0 %",  # 8.5 / 8
        "chat_model": "+37.5 ± 0.0 %",  # 11 / 8
    }
    assert "Change at 128: how much the perplexity differs from that of base, at the longest measured length" in caption(
        paths["markdown"]
    )
    assert r"+37.5 $\pm$ 0.0\,\%" in paths["latex"].read_text()


@pytest.mark.parametrize("base", [None, "mpt"])  # no row is the base as it is; it was not measured within its context
def test_without_a_measurement_of_the_base_there_is_no_price(records, render, base):
    paths = render(records, base=base)
    assert rows_of(paths["markdown"])["system"] == ["64", "128", "256"]
    assert "Change" not in caption(paths["markdown"])


def test_a_system_that_improves_on_the_base_has_a_negative_price_with_its_error(tmp_path, render):
    records = [write_cell(tmp_path, "base", "PG19", 64, 9.02), write_cell(tmp_path, "Long & 100 %", "PG19", 64, 9.0)]
    (change,) = rows_of(render(records, base="base")["markdown"])["Long & 100 %"][1:]
    assert re.fullmatch(r"−0\.2 ± [1-9]\.\d %", change)  # the noise of SIMILAR: 0.1 over 20 windows


def test_only_the_best_is_bold_if_no_differences_are_known(records, render, tmp_path):
    """Systems that read other windows cannot be compared."""
    for number, record in enumerate(records):
        windows = pandas.read_parquet(record.replace(".json", ".parquet"))
        windows.assign(begin=windows["begin"] + number).to_parquet(record.replace(".json", ".parquet"))
    paths = render(records)
    assert rows_of(paths["markdown"])["Long & 100 %"] == ["9.02 ± 0.09", "8.50 ± 0.09", "**7.90** ± 0.08"]
    assert pandas.read_csv(paths["differences_csv"]).empty


def test_the_caption_is_a_list_in_markdown_and_a_paragraph_in_latex(records, render):
    paths = render(records)
    items = caption_items(paths["markdown"])
    assert [item.split()[0] for item in items] == ["Perplexity", "±", "**Bold**:", "†"]
    (line,) = (line for line in paths["latex"].read_text().splitlines() if line.startswith(r"\caption{"))
    assert re.findall(r"Perplexity by|is the standard error|\\textbf\{Bold\}|beyond the model", line) == [
        "Perplexity by", "is the standard error", r"\textbf{Bold}", "beyond the model",
    ]  # fmt: skip


def test_the_caption_explains_the_marks_that_occur_and_no_others(records, render):
    text = caption(render(records)["markdown"])
    for sentence in ("Weights: nf4", "± is the standard error over windows", "† beyond the model's context", "95 % confidence"):
        assert sentence in text
    assert "Retrieval" not in text
    assert "⚠" not in text
    within = [record for record in records if json.loads(Path(record).read_text())["is_within_context"]]
    assert "†" not in render(within)["markdown"].read_text()


@pytest.mark.parametrize(
    ("protocol", "sentence"),
    [
        ({"protocol": "exact"}, "every token of a document but its first is scored once"),
        ({"protocol": "exact", "stride": 32}, "Stride 32."),
        ({"protocol": "longqlora"}, "protocol of LongQLoRA, consecutive windows"),
        ({"protocol": "longlora", "stride": 256}, "protocol of LongLoRA, a window every 256 tokens"),
    ],
)
def test_the_caption_names_the_protocol(tmp_path, render, protocol, sentence):
    record = write_cell(tmp_path, "base", "PG19", 64, 9.0, **protocol)
    assert sentence in caption(render([record])["markdown"])


def test_a_low_perplexity_with_poor_retrieval_is_marked(records, retrieval, render):
    paths = render(records, retrieval)
    rows = rows_of(paths["markdown"])
    assert rows["system"] == ["64", "retrieval at 64", "128", "256", "retrieval at 256"]
    assert rows["base"][1::3] == ["95 %", "–"]
    assert rows["Long & 100 %"][1::3] == ["100 %", "33 % ⚠"]
    assert rows["chat_model"][1::3] == ["–", "0 %"]  # whose perplexity is high as well
    text = caption(paths["markdown"])
    assert "Retrieval: accuracy, the mean over depths and tasks (multi key, passkey)" in text
    assert "⚠ low perplexity (at most 1.1 times the best of the column), but a retrieval accuracy below 50 %." in text
    assert "Questions in the chat template of the model: Long & 100 %, chat_model." in text
    cells = pandas.read_csv(paths["csv"])
    assert cells.query("label == 'base' and eval_length == 64")["retrieval_accuracy"].tolist() == [0.95, 0.95]


def test_the_csv_has_everything_of_every_record(records, render):
    cells = pandas.read_csv(render(records, published=PUBLISHED)["csv"])
    assert cells.query("label == 'base' and dataset_label == 'PG19' and eval_length == 256")["perplexity"].item() == 2345.0
    assert len(cells) == len(records) + 2
    assert {"standard_error", "stride", "precision", "is_within_context"} <= set(cells)


def test_published_rows_are_marked_and_not_compared(records, render):
    assert published_records([]).empty
    paths = render(records, published=[PUBLISHED[0] | {"perplexity": {"64": 1.0, "256": 8.0}}])
    rows = rows_of(paths["markdown"])
    assert rows["Paper (published)"] == ["1.00", "–", "8.00"]
    assert rows["base"][0].startswith("**")


def test_a_row_with_its_own_tokenizer_is_named_and_not_compared(records, render, tmp_path):
    own = write_cell(tmp_path / "cells", "MPT & co", "PG19", 64, 2.0, has_own_tokenizer=True)
    records = [record for record in records if json.loads(Path(record).read_text())["eval_length"] == 64]
    paths = render([*records, own], base="base")
    assert "token of its own tokenizer, not comparable with the other rows: MPT & co." in caption(paths["markdown"])
    rows = rows_of(paths["markdown"])
    assert rows["MPT & co"] == ["2.00 ± 0.02", "–"]  # although it read windows of equal numbers
    assert "MPT & co" not in paths["differences_csv"].read_text()
    assert rows["base"][0] == "**9.00** ± 0.09"


def test_longppl_has_a_column_at_the_longest_length_with_bold_by_its_own_differences(records, render, tmp_path):
    add_longppl(records, evaluator="chat_model")
    own = write_cell(tmp_path / "cells", "MPT & co", "PG19", 64, 2.0, has_own_tokenizer=True)
    paths = render([*records, own], published=PUBLISHED, base="base")
    rows = rows_of(paths["markdown"])
    assert rows["system"] == ["64", "128", "256", "LongPPL at 256", "change at 128"]
    assert {label: row[3] for label, row in rows.items() if label != "system"} == {
        "base": ">1000†", "Long & 100 %": "**3.95** ± 0.08", "chat_model": "5.00 ± 0.10", "MPT & co": "–",
        "Paper (published)": "–",
    }  # fmt: skip
    text = caption(paths["markdown"])
    assert "LongPPL at 256: the perplexity of the tokens that a long context helps to predict (40 of 200 in PG19" in text
    assert "as chosen by chat_model, which the choice favors." in text
    assert "rows: MPT & co. They have no LongPPL" in text
    assert r"as chosen by chat\_model" in paths["latex"].read_text()
    pairs = pandas.read_csv(paths["differences_csv"])
    assert pairs["tokens"].value_counts().to_dict() == {"all": 18, "key": 18}


def test_without_key_tokens_a_cell_of_longppl_is_a_dash(records, render):
    add_longppl(records, evaluator="chat_model")
    for record in records:
        cell = json.loads(Path(record).read_text())
        if cell["dataset"] == "PG19":
            cell |= {"num_key_tokens": 0, "longppl": None, "key_mean_nll": None, "key_standard_error": None}
            Path(record).write_text(json.dumps(cell))
    paths = render(records)
    assert {row[3] for row in rows_of(paths["markdown"]).values()} == {"LongPPL at 256", "–"}
    assert "0 of 200 in PG19, 40 of 200 in Proof-pile" in caption(paths["markdown"])


def test_if_there_are_no_key_tokens_at_all_the_table_says_so_and_has_no_column(records, render):
    add_longppl(records, evaluator="chat_model")
    for record in records:
        cell = json.loads(Path(record).read_text())
        cell |= {"num_key_tokens": 0, "longppl": None, "key_mean_nll": None, "key_standard_error": None}
        Path(record).write_text(json.dumps(cell))
    paths = render(records)
    assert rows_of(paths["markdown"])["system"] == ["64", "128", "256"]
    assert "0 of 200 in PG19, 0 of 200 in Proof-pile" in caption(paths["markdown"])


def test_a_warning_about_a_set_is_below_the_table(tmp_path, render):
    record = write_cell(tmp_path, "base", "PG19", 64, 9.0, dataset_warning="x_y.bin: 60% come back & more")
    paths = render([record])
    assert caption(paths["markdown"]).endswith("Warning: x_y.bin: 60% come back & more")
    assert r"Warning: x\_y.bin: 60\% come back \& more" in paths["latex"].read_text()


def test_latex_has_the_same_cells_with_special_characters_escaped(records, retrieval, render, tmp_path):
    own = write_cell(tmp_path / "cells", "MPT & co", "PG19", 64, 2.0, has_own_tokenizer=True)
    text = render([*records, own], retrieval, PUBLISHED)["latex"].read_text()
    row = next(line for line in text.splitlines() if line.startswith(r"Long \& 100 \%"))
    assert [cell.strip() for cell in re.split(r"(?<!\\)&", row.removesuffix(r" \\"))][:6] == [
        r"Long \& 100 \%", r"\textbf{9.02} $\pm$ 0.09", r"100\,\%", r"8.50 $\pm$ 0.09", r"\textbf{7.90} $\pm$ 0.08",
        r"33\,\% (!)",
    ]  # fmt: skip
    assert r"$>$1000\textsuperscript{\textdagger}" in text
    assert r"Questions in the chat template of the model: Long \& 100 \%, chat\_model." in text
    assert not re.search(r"(?<!\\)%", text)
    assert not re.search(r"(?<!\\)_", text.replace(r"\label{tab:perplexity}", ""))
    widths = {len(re.split(r"(?<!\\)&", line)) for line in text.splitlines() if line.endswith(r"\\") and "multicol" not in line}
    assert widths == {1 + 2 * 5}
    beginning = text[: text.index(r"\begin{tabular}")]
    assert not re.search(r"(?<!\\)&", beginning)
    assert not set("†⚠±") & set(text)


def test_a_system_with_several_seeds_is_one_row_with_the_mean_loss_and_the_spread_over_them(tmp_path):
    seeds = {"a": 8.0, "a.seed-2": 9.0}
    records = [write_cell(tmp_path, "base", "PG19", 128, 10.0)]
    records += [write_cell(tmp_path, "a", "PG19", 128, value, system=name) for name, value in seeds.items()]
    retrieval = [tmp_path / f"r{number}" for number in range(2)]
    for path, name, accuracy in zip(retrieval, seeds, (0.5, 1.0), strict=True):
        cells = [{"task": "passkey", "depth": 0, "accuracy": accuracy, "samples": 2}]
        record = {"system": name, "eval_length": 128, "accuracy": accuracy, "chat_template": False, "cells": cells}
        path.write_text(json.dumps(record))
    results = read_results(
        records=records,
        windows=windows_of(records),
        retrieval=list(map(str, retrieval)),
        choices={},
        labels={"system": {"base": "base", "a": "A & B", "a.seed-2": "A & B"}, "dataset": {"PG19": "PG19"}},
        published=[],
        base="base",
        extended={},
    )
    names = {"csv": "c.csv", "markdown": "t.md", "latex": "t.tex", "differences_csv": "d.csv"}
    paths = {name: tmp_path / file for name, file in names.items()}
    render_table(results, **{name: str(path) for name, path in paths.items()})
    mean, deviation = 72**0.5, 0.5**0.5
    assert rows_of(paths["markdown"])["A & B"] == [f"**{mean:.2f}** ± 0.08 ({deviation:.2f})", "75 %", "−15.1 ± 0.0 %"]
    assert "Trained by several seeds (A & B: 2): the perplexity of the mean loss over the seeds" in caption(paths["markdown"])
    assert r"(A \& B: 2)" in paths["latex"].read_text()
    (difference,) = pandas.read_csv(paths["differences_csv"]).to_dict("records")
    assert difference["perplexity_ratio"] == pytest.approx(10 / mean)
    row = pandas.read_csv(paths["csv"]).set_index("system").loc["a"]
    assert (row["seeds"], row["seeds_deviation"]) == (2, pytest.approx(deviation))


def test_without_several_seeds_a_table_has_nothing_of_them(render, records, retrieval):
    paths = render(records, retrieval)
    assert "seed" not in "".join(path.read_text() for path in paths.values())


def test_a_vertical_bar_in_a_label_does_not_end_its_cell(tmp_path):
    table = pandas.DataFrame({"64": ["9.00"]}, index=pandas.Index(["a | b"], name="system"))
    assert markdown_table(table).splitlines()[-1].replace(" ", "") == r"|a\|b|9.00|"
