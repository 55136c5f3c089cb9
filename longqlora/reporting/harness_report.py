"""Table of the scores on tasks of lm-evaluation-harness: one row per system and one column per task and metric."""

import json
import math
from pathlib import Path

import numpy
import pandas

from longqlora.evaluation.statistics import CONFIDENCE, Estimate, ratio_estimate
from longqlora.reporting.notation import MARKDOWN, markdown_list, markdown_table
from longqlora.reporting.records import Labels, labels_of


def read_harness(paths: list[str], labels: Labels, base: str | None) -> pandas.DataFrame:
    """Read the records of all systems and tasks, and compare the systems.

    Args:
        paths: JSON files, see :func:`longqlora.evaluation.harness.evaluate_harness`.
        labels: names of the systems in the table.
        base: name of the row that is the base model as it is; None if there is none.

    Returns:
        One row per record and metric: label, what the record says of it, ``column`` (its title in the table), ``is_shown`` (not
        a task of a group that has a score of its own), ``is_best`` (the best of its column, or not significantly different
        from it), and the paired difference from the base with its standard_error, if both have the same documents. See
        :func:`mean_over_seeds` for several seeds.
    """
    rows = []
    for path in paths:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        results = record.pop("results")
        has_own = any(result["task"] == record["requested"] for result in results)
        for result in results:
            shown = {"column": title_of(result), "is_shown": result["task"] == record["requested"] or not has_own}
            rows.append(labels_of(record, labels) | record | result | shown)
    rows = mean_over_seeds(rows)
    base_label = labels["system"][base] if base else None
    for column in {row["column"]: None for row in rows}:
        cells = [row for row in rows if row["column"] == column]
        best = best_of(cells)
        reference = next((cell for cell in cells if cell["label"] == base_label), None)
        for cell in cells:
            to_best, to_base = paired(cell, best), paired(cell, reference)
            cell["base"] = base_label
            cell["is_best"] = cell is best or (to_best is not None and not differs(to_best))
            cell["difference"] = to_base.mean if to_base else None
            cell["difference_standard_error"] = to_base.standard_error if to_base else None
    return pandas.DataFrame(rows)


def mean_over_seeds(rows: list[dict]) -> list[dict]:
    """One row for those of a system that was trained by several seeds, which have the same label: the value and the scores by
    document are means, and so is the standard error, which that of the mean does not exceed; ``seeds`` is their number. A task
    that was asked for by several names stays one row for each."""
    cells: dict[tuple[str, str, str], list[dict]] = {}
    for row in rows:
        cells.setdefault((row["label"], row["requested"], row["column"]), []).append(row)
    merged = []
    for seeds in cells.values():
        first = seeds[0] | {"seeds": len(seeds)}
        for key in ("value", "standard_error"):
            values = [row[key] for row in seeds]
            first[key] = None if None in values else sum(values) / len(values)
        scores = [row["scores"] for row in seeds]
        first["scores"] = None if None in scores else numpy.mean(scores, axis=0).tolist()
        merged.append(first)
    return merged


def title_of(result: dict) -> str:
    """The title of a column: task, length of the texts, metric, and filter unless it is the usual one."""
    length = f" at {result['eval_length']}" if result["eval_length"] else ""
    name = "" if result["filter"] == "none" else f" ({result['filter']})"
    return f"{result['task']}{length}: {result['metric']}{name}"


def best_of(cells: list[dict]) -> dict | None:
    """The best cell of a column; None if the harness does not say whether higher values are better, or has no scores by
    document, without which systems cannot be compared."""
    if cells[0]["higher_is_better"] is None or any(cell["scores"] is None for cell in cells):
        return None
    return (max if cells[0]["higher_is_better"] else min)(cells, key=lambda cell: cell["value"])


def paired(cell: dict, other: dict | None) -> Estimate | None:
    """The mean difference between two systems, paired by document; None if they do not have the same documents."""
    if other is None or cell is other or None in (cell["scores"], other["scores"]) or cell["documents"] != other["documents"]:
        return None
    differences = numpy.array(cell["scores"]) - numpy.array(other["scores"])
    return ratio_estimate(differences, numpy.ones(len(differences)))


def differs(estimate: Estimate) -> bool:
    """Whether a difference is significant: 0 lies outside of its confidence interval."""
    interval = estimate.interval()
    return interval is not None and not interval[0] <= 0 <= interval[1]


def format_score(value: float | None, standard_error: float | None, sign: str = "") -> str:
    """A score or a difference (``sign``: ``+``) with its standard error; a dash if there is none."""
    if value is None or math.isnan(value):
        return "–"
    text = f"{value:{sign}.3f}".replace("-", MARKDOWN.minus)
    missing = standard_error is None or math.isnan(standard_error)
    return text if missing else f"{text}{MARKDOWN.plus_minus}{standard_error:.3f}"


def tabulate(shown: pandas.DataFrame, texts: list[str]) -> str:
    """A Markdown table of one text per cell, rows and columns in their first order."""
    table = shown.assign(text=texts).pivot(index="label", columns="column", values="text")
    table = table.reindex(index=shown["label"].unique(), columns=shown["column"].unique()).fillna("–")
    table = table.rename_axis(index="system")
    return markdown_table(table)


def caption_of(shown: pandas.DataFrame) -> str:
    """The list below the table."""
    versions = ", ".join(shown["lm_eval_version"].unique())
    sentences = [
        f"Scores by lm-evaluation-harness {versions}. Weights: {', '.join(shown['precision'].unique())}.",
        f"{MARKDOWN.plus_minus.strip()} is the standard error over documents.",
        f"{MARKDOWN.bold.format('Bold')}: the best system of a column, and those that are not significantly different from it "
        f"(0 lies in the {100 * CONFIDENCE:.0f}{MARKDOWN.percent} confidence interval of the difference paired by document).",
    ]
    if shown["num_truncated"].any():
        sentences.append(f"{MARKDOWN.beyond} some prompts are longer than the model's context, and lost their beginning.")
    if shown["chat_template"].any():
        sentences.append(f"With a chat template: {', '.join(shown.loc[shown['chat_template'], 'label'].unique())}.")
    if (several := shown.loc[shown["seeds"] > 1, ["label", "seeds"]].drop_duplicates()).size:
        named = "; ".join(f"{row.label}: {row.seeds}" for row in several.itertuples())
        sentences.append(f"Trained by several seeds ({named}): the mean over the seeds.")
    described = []
    for task, rows in shown.groupby("task", sort=False):
        first = rows.iloc[0]
        shots = "" if pandas.isna(first["num_fewshot"]) else f", {first['num_fewshot']:.0f}-shot"
        described.append(f"{task} (version {first['task_version']}{shots}, {first['num_documents']:,.0f} documents)")
    return markdown_list([*sentences, f"Tasks: {'; '.join(described)}."])


def render_harness(cells: pandas.DataFrame, *, csv: str, markdown: str) -> None:
    """Write the scores as CSV, with the tasks of all groups, and as Markdown, with the differences from the base model.

    Args:
        cells: see :func:`read_harness`.
        csv, markdown: files to write.
    """
    cells.drop(columns=["scores", "column", "is_shown"]).to_csv(csv, index=False)
    shown = cells[cells["is_shown"]].drop_duplicates(["label", "column"])  # a task may be in a tag that is listed, too
    scores = []
    for cell in shown.to_dict("records"):
        text = format_score(cell["value"], cell["standard_error"])
        text = MARKDOWN.bold.format(text) if cell["is_best"] else text
        scores.append(text + (MARKDOWN.beyond if cell["num_truncated"] else ""))
    parts = ["# Tasks of lm-evaluation-harness", tabulate(shown, scores), caption_of(shown)]
    if (compared := shown[shown["difference"].notna()]).size:
        texts = [
            format_score(cell["difference"], cell["difference_standard_error"], "+") for cell in compared.to_dict("records")
        ]
        parts += [f"**Difference from {compared['base'].iloc[0]}**, paired by document", tabulate(compared, texts)]
    Path(markdown).write_text("\n\n".join(parts) + "\n", encoding="utf-8")
