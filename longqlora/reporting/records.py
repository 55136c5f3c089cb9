"""Results as data frames: the JSON records of the evaluation, and figures from the literature in the same shape."""

import json
from pathlib import Path

import pandas

Labels = dict[str, dict[str, str]]
"""Names in tables and plots, by the names of the configuration: ``{"system": {…}, "dataset": {…}}``. Records hold only the
names of the configuration, so a new label needs no new measurement."""


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
