"""Tables of perplexity and retrieval: one row a system, one column a context length, per evaluation set.

Which differences are real stands in the table: bold is the best system of a column, and every other that cannot be told from
it by the paired difference on the same windows.
"""

import json
import math
import re
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import pandas

from longqlora.config.ablations import name_of_cell
from longqlora.evaluation.statistics import CONFIDENCE, paired_difference

GOOD_PERPLEXITY = 1.1  # at most so many times the best of its column …
POOR_RETRIEVAL = 0.5  # … and less than this found again: a system that perplexity alone would flatter
CELL = ["dataset_label", "eval_length"]


@dataclass(frozen=True)
class Notation:
    """How numbers are written in a format."""

    bold: str
    plus_minus: str
    beyond: str
    warning: str
    percent: str


MARKDOWN = Notation("**{}**", " ± ", "†", " ⚠", " %")
LATEX = Notation(r"\textbf{{{}}}", r" $\pm$ ", r"\textsuperscript{\textdagger}", r" (!)", r"\,\%")


def read_records(paths: list[str], labels: dict[str, dict[str, str]]) -> pandas.DataFrame:
    """One row a cell from the JSON records of the evaluation, in the order given.

    Args:
        paths: of the records.
        labels: what systems and evaluation sets are called, by their names: ``{"system": {…}, "dataset": {…}}``. Records
            have the names alone, so that nothing is measured again for another label.
    """
    records = [json.loads(Path(path).read_text()) for path in paths]
    return pandas.DataFrame([labels_of(record, labels) | record for record in records])


def labels_of(record: dict, labels: dict[str, dict[str, str]]) -> dict[str, str]:
    """``label``, and ``dataset_label`` where the record is of an evaluation set."""
    found = {"label": labels["system"][record["system"]]}
    return found | ({"dataset_label": labels["dataset"][record["dataset"]]} if "dataset" in record else {})


def published_records(published: list[dict]) -> pandas.DataFrame:
    """Rows of figures from the literature in the shape of :func:`read_records`.

    Args:
        published: label, dataset (its label), and perplexity by context length, of each.
    """
    return pandas.DataFrame(
        [
            {
                "label": f"{row['label']} (published)",
                "dataset_label": row["dataset"],
                "eval_length": int(length),
                "perplexity": value,
            }
            for row in published
            for length, value in row["perplexity"].items()
        ],
        columns=["label", "dataset_label", "eval_length", "perplexity"],
    )


def differences(cells: pandas.DataFrame, windows: list[str]) -> pandas.DataFrame:
    """Every pair of systems that read the same windows: the difference of their mean losses with its confidence interval.

    Args:
        cells: of :func:`read_records`.
        windows: Parquet file of each cell, in the same order.

    Returns:
        By evaluation set, context length, system and other: difference (nats, below zero where the system is better),
        standard_error, low, high, perplexity_ratio, significant (the interval leaves out zero).
    """
    rows = []
    for (dataset, length), group in cells.groupby(CELL, sort=False):
        losses = {index: pandas.read_parquet(windows[index]) for index in group.index}
        for one, other in combinations(group.index, 2):
            estimate = paired_difference(losses[one], losses[other], group.loc[one].to_dict())
            if estimate is None or (interval := estimate.interval()) is None:
                continue
            labels = {"system": group.loc[one, "label"], "other": group.loc[other, "label"]}
            measured = {"difference": estimate.mean, "standard_error": estimate.standard_error}
            measured |= {"low": interval[0], "high": interval[1], "perplexity_ratio": math.exp(estimate.mean)}
            significant = not interval[0] <= 0 <= interval[1]
            rows.append({"dataset_label": dataset, "eval_length": length, **labels, **measured, "significant": significant})
    columns = [*CELL, "system", "other", "difference", "standard_error", "low", "high", "perplexity_ratio", "significant"]
    return pandas.DataFrame(rows, columns=columns)


def statistically_best(cells: pandas.DataFrame, pairs: pandas.DataFrame) -> set[tuple[str, str, int]]:
    """(label, evaluation set, context length) of the best system of each column, and of those not really different from it.

    Systems with a tokenizer of their own, whose loss is per other tokens, do not compete.
    """
    found = set()
    competing = cells[~cells["has_own_tokenizer"].astype(bool)]
    for (dataset, length), group in competing.groupby(CELL, sort=False):
        best = group.loc[group["perplexity"].idxmin(), "label"]
        here = pairs[
            (pairs["dataset_label"] == dataset) & (pairs["eval_length"] == length) & ~pairs["significant"].astype(bool)
        ]
        equal = set(here.loc[here["system"] == best, "other"]) | set(here.loc[here["other"] == best, "system"])
        found |= {(label, dataset, length) for label in equal | {best}}
    return found


def low_perplexity_poor_retrieval(cells: pandas.DataFrame, retrieval: pandas.DataFrame) -> set[tuple[str, str, int]]:
    """(label, evaluation set, context length) of cells whose perplexity is good and whose retrieval is not."""
    cells = cells[~cells["has_own_tokenizer"].astype(bool)]  # theirs is per other tokens
    best = cells.groupby(CELL)["perplexity"].transform("min")
    good = cells[cells["perplexity"] <= GOOD_PERPLEXITY * best]
    poor = {(row.label, row.eval_length) for row in retrieval.itertuples() if row.accuracy < POOR_RETRIEVAL}
    return {
        (row.label, row.dataset_label, row.eval_length) for row in good.itertuples() if (row.label, row.eval_length) in poor
    }


def format_perplexity(value: float) -> str:
    """Two decimals; ``>1000`` for what is off the scale, as in the paper; a dash where nothing was measured."""
    if pandas.isna(value):
        return "–"
    return ">1000" if value > 1000 else f"{value:.2f}"


def format_cell(cell: dict, notation: Notation, is_leader: bool) -> str:
    """Perplexity with its standard error, bold if it is a leader, marked if it is beyond the model's context."""
    text, error = format_perplexity(cell["perplexity"]), cell.get("standard_error")
    text = notation.bold.format(text) if is_leader else text
    if error is not None and not pandas.isna(error) and cell["perplexity"] <= 1000:
        text += f"{notation.plus_minus}{cell['perplexity'] * error:.2f}"
    return text + (notation.beyond if cell.get("is_within_context") is False else "")


def layout(
    cells: pandas.DataFrame, retrieval: pandas.DataFrame, notation: Notation, pairs: pandas.DataFrame
) -> pandas.DataFrame:
    """The table as text: systems as rows, (evaluation set, context length) as columns, beside each the retrieval accuracy.

    Args:
        cells: measured and published.
        retrieval: records of retrieval; may be empty.
        notation: of the format.
        pairs: of :func:`differences`.
    """
    measured = cells[cells["has_own_tokenizer"].notna()]
    bold, warned = statistically_best(measured, pairs), low_perplexity_poor_retrieval(measured, retrieval)
    found = {(row.label, row.eval_length): row.accuracy for row in retrieval.itertuples()}
    lengths, rows = sorted(cells["eval_length"].unique()), {}
    by_place = {(cell["label"], cell["dataset_label"], cell["eval_length"]): cell for cell in cells.to_dict("records")}
    for label in cells["label"].unique():
        row = {}
        for dataset in cells["dataset_label"].unique():
            for length in lengths:
                place = (label, dataset, length)
                row[dataset, str(length)] = format_cell(by_place[place], notation, place in bold) if place in by_place else "–"
                if found and length in {at for _, at in found}:
                    accuracy = found.get((label, length))
                    text = "–" if accuracy is None else f"{100 * accuracy:.0f}{notation.percent}"
                    row[dataset, f"found at {length}"] = text + (notation.warning if place in warned else "")
        rows[label] = row
    table = pandas.DataFrame(rows.values(), index=pandas.Index(rows, name="system"))
    table.columns = pandas.MultiIndex.from_tuples(table.columns, names=["evaluation set", "context length"])
    return table


PROTOCOLS = {
    "exact": "every token of a document but its first is scored once, in windows inside the document",
    "longqlora": "protocol of LongQLoRA: windows one after the other, the mean of their means",
    "longlora": "protocol of LongLoRA: a window every {stride} tokens, the mean of their means",
}


def caption_of(cells: pandas.DataFrame, retrieval: pandas.DataFrame, notation: Notation, warned: bool) -> str:
    """What the numbers are and what the marks mean, in sentences."""
    protocol, plain = cells.iloc[0], escape_latex if notation is LATEX else str
    units = ", ".join(sorted(cells["standard_error_units"].unique()))
    precisions = ", ".join(cells["precision"].unique())
    sentences = [
        f"Perplexity by context length, {PROTOCOLS[protocol['protocol']].format(**protocol)}; weights: {precisions}.",
        f"{notation.plus_minus.strip()} is the standard error, over {units}.",
        f"{notation.bold.format('Bold')}: the best of a column, and what cannot be told from it (zero lies in the "
        f"{100 * CONFIDENCE:.0f}{notation.percent} interval of the paired difference).",
    ]
    if protocol["protocol"] == "exact" and (cells["stride"] < cells["window"]).any():
        sentences.append(f"Stride {', '.join(map(str, cells['stride'].unique()))}.")
    if not cells["is_within_context"].all():
        sentences.append(f"{notation.beyond} beyond the model's context, positions not scaled.")
    if len(retrieval):
        tasks = sorted({task for cell in retrieval["cells"] for task in pandas.DataFrame(cell)["task"]})
        sentences.append(f"Found: retrieval accuracy, the mean over depths and tasks ({', '.join(tasks).replace('_', ' ')}).")
    if warned:
        sentences.append(
            f"{notation.warning.strip()} perplexity is good here (at most {GOOD_PERPLEXITY:g} times the best), yet less than "
            f"{100 * POOR_RETRIEVAL:.0f}{notation.percent} is found again."
        )
    others = cells.loc[cells["has_own_tokenizer"].astype(bool), "label"].unique()
    if len(others):
        named = plain(", ".join(others))
        sentences.append(f"Per token of its own tokenizer, not of the base model's, and not compared: {named}.")
    for warning in cells["dataset_warning"].dropna().unique():
        sentences.append(f"Warning: {plain(warning)}")
    return " ".join(sentences)


def escape_latex(text: str) -> str:
    """Text as LaTeX prints it."""
    escaped = re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", r"\textbackslash "))
    return escaped.replace("~", r"\textasciitilde ").replace("^", r"\textasciicircum ").replace(">", "$>$")


def write_markdown(path: str, table: pandas.DataFrame, caption: str, title: str | None = None) -> None:
    """One table for each evaluation set, and the caption below."""
    parts = [f"# {title}"] if title else []
    for dataset in table.columns.unique(0):
        part = table[dataset]
        alignment = ["left"] + ["right"] * part.shape[1]
        parts.append(f"**{dataset}**\n\n" + part.to_markdown(colalign=alignment, disable_numparse=True))
    Path(path).write_text("\n\n".join([*parts, caption]) + "\n", encoding="utf-8")


def write_latex(path: str, table: pandas.DataFrame, caption: str, label: str) -> None:
    """One table (booktabs) with the evaluation sets side by side; its cells are LaTeX already."""
    table = table.rename(index=escape_latex, columns=escape_latex).replace({">1000": "$>$1000"}, regex=True)
    text = table.to_latex(
        escape=False, caption=caption, label=label, multicolumn_format="c", column_format="l" + "r" * table.shape[1]
    )
    Path(path).write_text(text, encoding="utf-8")


def render_table(
    *,
    records: list[str],
    windows: list[str],
    retrieval: list[str],
    labels: dict[str, dict[str, str]],
    published: list[dict],
    csv: str,
    markdown: str,
    latex: str,
    differences_csv: str,
) -> None:
    """Write the table as CSV (one line a cell, all of the record), Markdown and LaTeX (booktabs), and the differences.

    Args:
        records: paths of JSON records of perplexity.
        windows: path of the Parquet file of each.
        retrieval: paths of JSON records of retrieval; may be empty.
        labels: see :func:`read_records`.
        published: reference rows, see :func:`published_records`.
        csv, markdown, latex, differences_csv: paths to write.
    """
    measured, found = read_records(records, labels), read_records(retrieval, labels)
    pairs = differences(measured, windows)
    pairs.to_csv(differences_csv, index=False)
    cells = pandas.concat([measured, published_records(published)], ignore_index=True)
    if len(found):
        accuracy = found[["label", "eval_length", "accuracy"]].rename(columns={"accuracy": "retrieval_accuracy"})
        cells = cells.merge(accuracy, how="left", on=["label", "eval_length"])
    cells.drop(columns="loss_by_position").to_csv(csv, index=False)
    warned = bool(low_perplexity_poor_retrieval(measured, found))
    write_markdown(markdown, layout(cells, found, MARKDOWN, pairs), caption_of(measured, found, MARKDOWN, warned))
    write_latex(latex, layout(cells, found, LATEX, pairs), caption_of(measured, found, LATEX, warned), "tab:perplexity")


def render_retrieval(*, records: list[str], labels: dict[str, dict[str, str]], csv: str, markdown: str) -> None:
    """Write retrieval accuracy as CSV (a line a task and depth) and Markdown (a table a task, the mean over depths).

    Args:
        records: paths of JSON records of retrieval.
        labels: see :func:`read_records`.
        csv, markdown: paths to write.
    """
    cells = read_retrieval(records, labels)
    cells.to_csv(csv, index=False)
    parts = ["# Retrieval accuracy"]
    for task, rows in cells.groupby("task", sort=False):
        table = rows.pivot_table(index="label", columns="eval_length", values="accuracy", sort=False)
        table = table.rename_axis(index="system").map(lambda share: f"{100 * share:.0f} %")
        asked = rows.groupby(["label", "eval_length"])["samples"].sum().iloc[0]
        text = table.to_markdown(colalign=["left"] + ["right"] * table.shape[1], disable_numparse=True)
        parts.append(f"**{task.replace('_', ' ')}**, mean of {asked} questions over {rows['depth'].nunique()} depths\n\n{text}")
    Path(markdown).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def read_retrieval(paths: list[str], labels: dict[str, dict[str, str]]) -> pandas.DataFrame:
    """One row a task and depth of each record: label, eval_length, how the context is extended, task, depth, accuracy,
    samples."""
    stamp = ("label", "eval_length", "rope_scaling", "rope_factor", "target_context")
    return pandas.DataFrame(
        [
            {key: record[key] for key in stamp} | cell
            for record in read_records(paths, labels).to_dict("records")
            for cell in record["cells"]
        ]
    )


def ablation_cells(records: list[str], ablation: dict, labels: dict[str, dict[str, str]]) -> pandas.DataFrame:
    """The records of a grid, each with the values of its axes, and a label made of them."""
    cells = read_records(records, labels)
    for axis in ablation["axes"]:
        cells[axis] = [ablation["rows"][system][axis] for system in cells["system"]]
    cells["label"] = [name_of_cell(ablation["rows"][system]) for system in cells["system"]]
    return cells


def render_ablation(
    *,
    records: list[str],
    windows: list[str],
    ablation: dict,
    labels: dict[str, dict[str, str]],
    csv: str,
    markdown: str,
    latex: str,
) -> None:
    """Write the table of a grid: a row a combination of settings.

    Args:
        records: paths of JSON records of perplexity.
        windows: path of the Parquet file of each.
        ablation: label, axes and rows, see :func:`longqlora.config.ablations.add_ablations`.
        labels: see :func:`read_records`.
        csv, markdown, latex: paths to write.
    """
    cells, nothing = ablation_cells(records, ablation, labels), read_records([], labels)  # of retrieval
    cells.drop(columns="loss_by_position").to_csv(csv, index=False)
    pairs, title = differences(cells, windows), ablation["label"]
    write_markdown(markdown, layout(cells, nothing, MARKDOWN, pairs), caption_of(cells, nothing, MARKDOWN, False), title)
    caption = f"{escape_latex(title)}. {caption_of(cells, nothing, LATEX, False)}"
    write_latex(latex, layout(cells, nothing, LATEX, pairs), caption, "tab:ablation")
