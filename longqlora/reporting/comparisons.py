"""Comparisons between systems: differences with confidence intervals, and the marks that they set in a table."""

import math
from collections.abc import Iterator
from itertools import combinations

import pandas

from longqlora.config.settings import Protocol
from longqlora.evaluation.statistics import on_key_tokens, paired_difference

LOW_PERPLEXITY = 1.1  # a perplexity is low if it is at most this many times the best of its column
POOR_RETRIEVAL = 0.5  # retrieval is poor if its accuracy is below this
COLUMN = ["dataset_label", "eval_length"]  # what identifies a column of the table
GAINS = [
    "target_context", *COLUMN, "trained", "untrained", "trained_perplexity", "untrained_perplexity", "change", "standard_error",
    "significant",
]  # fmt: skip
DIFFERENCES = [
    *COLUMN, "system", "other", "difference", "standard_error", "low", "high", "perplexity_ratio", "significant",
]  # fmt: skip


def differences(cells: pandas.DataFrame, windows: list[str], of_key_tokens: bool = False) -> pandas.DataFrame:
    """Paired differences between all systems that were measured on the same windows of the same tokens.

    Args:
        cells: see :func:`longqlora.reporting.records.read_records`.
        windows: Parquet file with the losses of each cell's windows, by the index of the cells.
        of_key_tokens: compare the losses of the key tokens instead of those of all tokens.

    Returns:
        One row per pair of systems in a column of the table: difference of their mean losses (nats, below 0 if ``system`` is
        better than ``other``), standard_error, low and high (confidence interval), perplexity_ratio, and significant (whether
        the interval excludes 0).
    """
    rows = []
    for (dataset, length), group in cells.groupby(COLUMN, sort=False):
        by_label = [rows for _, rows in group.groupby("label", sort=False)]  # several rows: the seeds of a system
        records = [rows.to_dict("records")[0] for rows in by_label]
        losses = [mean_losses([windows[index] for index in rows.index], of_key_tokens) for rows in by_label]
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


def mean_losses(paths: list[str], of_key_tokens: bool) -> pandas.DataFrame:
    """The losses of the windows of a cell, or of their key tokens alone, the mean over the seeds of its system."""
    seeds = [pandas.read_parquet(path) for path in paths]
    seeds = [on_key_tokens(windows) for windows in seeds] if of_key_tokens else seeds
    return seeds[0].assign(nll=sum(losses["nll"] for losses in seeds) / len(seeds)) if len(seeds) > 1 else seeds[0]


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


def gains_from_training(
    cells: pandas.DataFrame, pairs: pandas.DataFrame, extended: dict[int, dict[str, list[str]]]
) -> pandas.DataFrame:
    """How the perplexity of the best trained row differs from that of the best untrained row that extends the base model to the
    same context, at the longest measured length within it.

    Args:
        cells: see :func:`longqlora.reporting.records.read_records`.
        pairs: see :func:`differences`.
        extended: labels of the ``trained`` and the ``untrained`` rows, by target context.

    Returns:
        One row per target context and evaluation set: target_context, dataset_label, eval_length; trained and untrained, the
        labels of the two rows, with trained_perplexity and untrained_perplexity; change (ratio of the perplexities, minus 1),
        its standard_error, and significant.
    """
    rows = []
    for target, labels in extended.items():
        for dataset, group in cells[cells["eval_length"] <= target].groupby("dataset_label", sort=False):
            length = group["eval_length"].max()
            column = group[group["eval_length"] == length]
            trained, untrained = (
                min(column[column["label"].isin(labels[kind])].to_dict("records"), key=lambda cell: cell["perplexity"])
                for kind in ("trained", "untrained")
            )
            same_column = pairs[(pairs["dataset_label"] == dataset) & (pairs["eval_length"] == length)]
            for change in changes(same_column, trained["label"], untrained["label"]):
                perplexities = (trained["perplexity"], untrained["perplexity"])
                rows.append((target, dataset, length, trained["label"], untrained["label"], *perplexities, *change))
    return pandas.DataFrame(rows, columns=GAINS)


def changes(pairs: pandas.DataFrame, label: str, other: str) -> Iterator[tuple[float, float, bool]]:
    """Yield how the perplexity of a row differs from that of another one, in each column where both are compared: the change
    (ratio of the perplexities, minus 1), its standard error, and whether it is significant."""
    for pair in pairs.to_dict("records"):
        if (pair["system"], pair["other"]) in ((label, other), (other, label)):
            ratio = math.exp(pair["difference"] if pair["system"] == label else -pair["difference"])
            yield ratio - 1, ratio * pair["standard_error"], pair["significant"]


def comparable(cells: pandas.DataFrame) -> pandas.DataFrame:
    """The cells whose loss is per token of the base model's tokenizer."""
    return cells[~cells["has_own_tokenizer"].astype(bool)]
