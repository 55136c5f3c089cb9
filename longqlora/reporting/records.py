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
    """``label``, and ``dataset_label`` if the record has an evaluation set."""
    system = {"label": labels["system"][record["system"]]}
    return system | ({"dataset_label": labels["dataset"][record["dataset"]]} if "dataset" in record else {})


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
