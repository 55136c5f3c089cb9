"""Comparisons between systems: differences with confidence intervals, and the marks that they set in a table."""

import math
from itertools import combinations

import pandas

from longqlora.config.settings import Protocol
from longqlora.evaluation.statistics import paired_difference

LOW_PERPLEXITY = 1.1  # a perplexity is low if it is at most this many times the best of its column
POOR_RETRIEVAL = 0.5  # retrieval is poor if its accuracy is below this
COLUMN = ["dataset_label", "eval_length"]  # what identifies a column of the table
DIFFERENCES = [
    *COLUMN, "system", "other", "difference", "standard_error", "low", "high", "perplexity_ratio", "significant",
]  # fmt: skip


def differences(cells: pandas.DataFrame, windows: list[str]) -> pandas.DataFrame:
    """Paired differences between all systems that were measured on the same windows of the same tokens.

    Args:
        cells: see :func:`longqlora.reporting.records.read_records`.
        windows: Parquet file with the losses of each cell's windows, in the order of the cells.

    Returns:
        One row per pair of systems in a column of the table: difference of their mean losses (nats, below 0 if ``system`` is
        better than ``other``), standard_error, low and high (confidence interval), perplexity_ratio, and significant (whether
        the interval excludes 0).
    """
    rows = []
    for (dataset, length), group in cells.groupby(COLUMN, sort=False):
        records = group.to_dict("records")
        losses = [pandas.read_parquet(windows[index]) for index in group.index]
        for one, other in combinations(range(len(records)), 2):
            if records[one]["has_own_tokenizer"] != records[other]["has_own_tokenizer"]:
                continue  # other tokens, even if there happen to be as many windows
            estimate = paired_difference(losses[one], losses[other], protocol_of(records[one]))
            if estimate is None or (interval := estimate.interval()) is None:
                continue
            low, high = interval
            labels = (records[one]["label"], records[other]["label"])
            measured = (estimate.mean, estimate.standard_error, low, high, math.exp(estimate.mean))
            rows.append((dataset, length, *labels, *measured, not low <= 0 <= high))
    return pandas.DataFrame(rows, columns=DIFFERENCES)


def protocol_of(record: dict) -> Protocol:
    """The protocol that a cell was measured by."""
    return Protocol(name=record["protocol"], window=int(record["window"]), stride=int(record["stride"]))


def statistically_best(cells: pandas.DataFrame, pairs: pandas.DataFrame) -> set[tuple[str, str, int]]:
    """(label, evaluation set, context length) of the best system of each column, and of those not significantly different from
    it. Systems with a tokenizer of their own are left out, because their loss is per token of another kind.

    Args:
        cells: see :func:`longqlora.reporting.records.read_records`.
        pairs: see :func:`differences`.
    """
    columns: dict[tuple[str, int], list[dict]] = {}
    for cell in comparable(cells).to_dict("records"):
        columns.setdefault((cell["dataset_label"], cell["eval_length"]), []).append(cell)
    best = {(min(column, key=lambda cell: cell["perplexity"])["label"], *place) for place, column in columns.items()}
    similar = set()
    for pair in pairs.to_dict("records"):
        place = (pair["dataset_label"], pair["eval_length"])
        for one, other in [("system", "other"), ("other", "system")]:
            if not pair["significant"] and (pair[one], *place) in best:
                similar.add((pair[other], *place))
    return best | similar


def low_perplexity_poor_retrieval(cells: pandas.DataFrame, retrieval: pandas.DataFrame) -> set[tuple[str, str, int]]:
    """(label, evaluation set, context length) of the cells with a low perplexity but a poor retrieval accuracy.

    Args:
        cells, retrieval: records of perplexity and of retrieval, see :func:`longqlora.reporting.records.read_records`.
    """
    cells = comparable(cells)
    best = cells.groupby(COLUMN)["perplexity"].transform("min")
    low = cells[cells["perplexity"] <= LOW_PERPLEXITY * best].to_dict("records")
    poor = {(cell["label"], cell["eval_length"]) for cell in retrieval.to_dict("records") if cell["accuracy"] < POOR_RETRIEVAL}
    return {
        (cell["label"], cell["dataset_label"], cell["eval_length"])
        for cell in low
        if (cell["label"], cell["eval_length"]) in poor
    }


def price_at_short_lengths(cells: pandas.DataFrame, pairs: pandas.DataFrame, base: str | None) -> pandas.DataFrame:
    """How the perplexity of each system differs from the base model's where the base needs no extension: at the longest length
    that was measured inside its context.

    Args:
        cells: see :func:`longqlora.reporting.records.read_records`.
        pairs: see :func:`differences`.
        base: label of the base model as it is; None if no row has it.

    Returns:
        One row per system and evaluation set that can be compared with the base: label, base, dataset_label, eval_length,
        change (ratio of the perplexities, minus 1) and its standard_error.
    """
    inside = cells[(cells["label"] == base) & cells["is_within_context"].astype(bool)]
    pairs = pairs[pairs["eval_length"] == inside["eval_length"].max()]
    rows = []
    for pair in pairs.to_dict("records"):
        for one, other, sign in [("system", "other", 1), ("other", "system", -1)]:
            if pair[other] == base:
                ratio = math.exp(sign * pair["difference"])
                place = (pair["dataset_label"], pair["eval_length"])
                rows.append((pair[one], base, *place, ratio - 1, ratio * pair["standard_error"]))
    return pandas.DataFrame(rows, columns=["label", "base", *COLUMN, "change", "standard_error"])


def comparable(cells: pandas.DataFrame) -> pandas.DataFrame:
    """The cells whose loss is per token of the base model's tokenizer."""
    return cells[~cells["has_own_tokenizer"].astype(bool)]
