"""Results as data frames: the JSON records of the evaluation, and figures from the literature in the same shape."""

import json
import math
from pathlib import Path

import pandas

Labels = dict[str, dict[str, str]]
"""Names in tables and plots, by the names of the configuration: ``{"system": {…}, "dataset": {…}}``. Records hold only the
names of the configuration, so a new label needs no new measurement."""

PUBLISHED = " (published)"  # ends the labels of rows from the literature


def read_records(paths: list[str], labels: Labels) -> pandas.DataFrame:
    """Read the JSON records of an evaluation.

    Args:
        paths: records of perplexity, or of retrieval.
        labels: names of systems and evaluation sets in tables and plots.

    Returns:
        One row per record, in the order of the paths: its keys, ``label``, and ``dataset_label`` if it has an evaluation set.
    """
    records = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    return pandas.DataFrame([labels_of(record, labels) | record for record in records])


def mean_over_seeds(cells: pandas.DataFrame) -> pandas.DataFrame:
    """Cells in which those of one system that was trained by several seeds, which have the same label, are one.

    Args:
        cells: records of perplexity or of retrieval, see :func:`read_records`.

    Returns:
        The cells; if there are several seeds, with the columns ``seeds`` (number of them, 1 for other systems) and, for
        perplexity, ``seeds_deviation`` (standard deviation of the perplexity over the seeds). Loss and accuracy are means over
        the seeds, and the perplexity is that of the mean loss. The standard error is the mean of those of the seeds, which that
        of the mean loss does not exceed. The index is that of the first seed.
    """
    keys = [key for key in ("label", "dataset_label", "eval_length") if key in cells]
    if cells.empty or not cells.duplicated(keys).any():
        return cells
    merged = []
    for _, group in cells.groupby(keys, sort=False):
        first, means = group.iloc[0].copy(), ("mean_nll", "standard_error", "accuracy")
        first["seeds"] = len(group)
        if len(group) > 1:
            for column in means:
                if column in group:
                    first[column] = group[column].mean()
            if "mean_nll" in group:
                first["perplexity"], first["seeds_deviation"] = math.exp(first["mean_nll"]), group["perplexity"].std()
                first["loss_by_position"] = mean_by_position(group["loss_by_position"])
            if "longppl" in group and group["longppl"].notna().all():
                first["longppl"] = math.exp(group["longppl"].astype(float).map(math.log).mean())
                first["key_standard_error"] = group["key_standard_error"].astype(float).mean()
        merged.append(first)
    return pandas.DataFrame(merged)


def mean_by_position(losses: pandas.Series) -> dict[str, list]:
    """The mean of losses by position, as the records have them, on the same windows."""
    return losses.iloc[0] | {
        "nll": [sum(values) / len(losses) for values in zip(*(each["nll"] for each in losses), strict=True)]
    }


def labels_of(record: dict, labels: Labels) -> dict[str, str]:
    """``label``; ``dataset_label`` if the record has an evaluation set; ``evaluator_label`` if it has a LongPPL."""
    found = {"label": labels["system"][record["system"]]}
    if "dataset" in record:
        found["dataset_label"] = labels["dataset"][record["dataset"]]
    if record.get("evaluator"):
        found["evaluator_label"] = labels["system"][record["evaluator"]]
    return found


def longppl_of(cells: pandas.DataFrame) -> pandas.DataFrame:
    """The cells that have a LongPPL, with it in place of the perplexity; the index stays.

    Args:
        cells: records of perplexity, see :func:`read_records`.
    """
    if "longppl" not in cells:
        return cells.iloc[:0]
    found = cells.dropna(subset="longppl")
    return found.assign(perplexity=found["longppl"].astype(float), standard_error=found["key_standard_error"].astype(float))


def chat_sentences(retrieval: pandas.DataFrame) -> list[str]:
    """A sentence that names the systems whose retrieval questions were written with a chat template; none if there are none.

    Args:
        retrieval: rows with label and chat_template; may be empty.
    """
    labels = () if retrieval.empty else retrieval.loc[retrieval["chat_template"].astype(bool), "label"].unique()
    return [f"Questions in the chat template of the model: {', '.join(labels)}."] if len(labels) else []


def published_records(published: list[dict]) -> pandas.DataFrame:
    """Perplexities from the literature in the shape of :func:`read_records`.

    Args:
        published: for each row its label, dataset (the label of the evaluation set), and perplexity by context length.
    """
    return pandas.DataFrame(
        [
            {
                "label": row["label"] + PUBLISHED,
                "dataset_label": row["dataset"],
                "eval_length": int(length),
                "perplexity": value,
            }
            for row in published
            for length, value in row["perplexity"].items()
        ],
        columns=["label", "dataset_label", "eval_length", "perplexity"],
    )
