"""The table of perplexity and retrieval: one row per system and one column per context length, for each evaluation set.

Bold marks the best system of a column and every system that is not significantly different from it by the paired difference on
the same windows.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pandas

from longqlora.reporting.captions import caption_of
from longqlora.reporting.comparisons import (
    DIFFERENCES,
    differences,
    gains_from_training,
    low_perplexity_poor_retrieval,
    price_at_short_lengths,
    statistically_best,
)
from longqlora.reporting.notation import (
    LATEX,
    MARKDOWN,
    Notation,
    escape_latex,
    format_perplexity,
    markdown_list,
    markdown_table,
)
from longqlora.reporting.records import Labels, longppl_of, mean_over_seeds, published_records, read_records


@dataclass(frozen=True)
class Results:
    """All that a table shows.

    Attributes:
        measured: records of perplexity, see :func:`longqlora.reporting.records.read_records`.
        retrieval: records of retrieval; may be empty.
        published: see :func:`longqlora.reporting.records.published_records`; may be empty.
        pairs: see :func:`longqlora.reporting.comparisons.differences`.
        base: label of the base model as it is; None if no row has it.
        extended: labels of the trained and the untrained rows, see
            :func:`longqlora.reporting.comparisons.gains_from_training`.
        choices: labels of rows with ``rope_scaling: best``, and the record of their choice.
        key_pairs: ``pairs`` of the losses of the key tokens; empty if there is no LongPPL.
    """

    measured: pandas.DataFrame
    retrieval: pandas.DataFrame
    published: pandas.DataFrame
    pairs: pandas.DataFrame
    base: str | None = None
    extended: dict[int, dict[str, list[str]]] = field(default_factory=dict)
    choices: list[tuple[list[str], dict]] = field(default_factory=list)
    key_pairs: pandas.DataFrame = field(default_factory=lambda: pandas.DataFrame(columns=DIFFERENCES))

    @property
    def longppl(self) -> pandas.DataFrame:
        """The measured cells of the longest length, with their LongPPL in place of the perplexity; may be empty."""
        cells = longppl_of(self.measured)
        return cells[cells["eval_length"] == cells["eval_length"].max()]

    @property
    def cells(self) -> pandas.DataFrame:
        """Measured and published perplexities."""
        return pandas.concat([self.measured, self.published], ignore_index=True)

    @property
    def prices(self) -> pandas.DataFrame:
        """See :func:`longqlora.reporting.comparisons.price_at_short_lengths`; may be empty."""
        return price_at_short_lengths(self.measured, self.pairs, self.base)

    @property
    def gains(self) -> pandas.DataFrame:
        """See :func:`longqlora.reporting.comparisons.gains_from_training`; may be empty."""
        return gains_from_training(self.measured, self.pairs, self.extended)

    def caption(self, notation: Notation) -> list[str]:
        """See :func:`longqlora.reporting.captions.caption_of`."""
        return caption_of(self.measured, self.retrieval, self.prices, self.gains, self.choices, notation)


def read_results(
    *,
    records: list[str],
    windows: list[str],
    retrieval: list[str],
    choices: dict[str, list[str]],
    labels: Labels,
    published: list[dict],
    base: str | None,
    extended: dict[int, dict[str, list[str]]],
) -> Results:
    """Read all that the table of an experiment shows.

    Args:
        records: JSON records of perplexity.
        windows: Parquet file with the losses of the windows of each record.
        retrieval: JSON records of retrieval; may be empty.
        choices: names of the systems with ``rope_scaling: best``, by the JSON record of their choice.
        labels: names of systems and evaluation sets in the table.
        published: rows from the literature, see :func:`longqlora.reporting.records.published_records`.
        base: name of the system that is the base model as it is; None if there is none.
        extended: names of the trained and the untrained systems that extend the base, by target context.
    """
    measured, label_of = read_records(records, labels), labels["system"]
    return Results(
        measured=mean_over_seeds(measured),
        retrieval=mean_over_seeds(read_records(retrieval, labels)),
        published=published_records(published),
        pairs=differences(measured, windows),
        base=label_of[base] if base else None,
        extended={
            target: {kind: list(dict.fromkeys(label_of[name] for name in names)) for kind, names in rows.items()}
            for target, rows in extended.items()
        },
        choices=[
            (list(dict.fromkeys(label_of[name] for name in names)), json.loads(Path(path).read_text(encoding="utf-8")))
            for path, names in choices.items()
        ],
        key_pairs=differences(longppl_of(measured), windows, of_key_tokens=True),
    )


def format_cell(cell: dict, notation: Notation, is_best: bool) -> str:
    """Perplexity with its standard error and its deviation over seeds; bold if it is among the best, marked if it is beyond the
    model's context."""
    text, error = format_perplexity(cell["perplexity"]), cell.get("standard_error")
    text = notation.bold.format(text) if is_best else text
    if error is not None and not pandas.isna(error) and cell["perplexity"] <= 1000:
        text += f"{notation.plus_minus}{cell['perplexity'] * error:.2f}"
    deviation = cell.get("seeds_deviation")
    if deviation is not None and not pandas.isna(deviation) and cell["perplexity"] <= 1000:
        text += f" ({deviation:.2f})"
    return text + (notation.beyond if cell.get("is_within_context") is False else "")


def format_price(price: dict | None, notation: Notation) -> str:
    """A difference from the base model in percent, with its standard error; a dash if there is none."""
    if price is None:
        return "–"
    sign = "+" if price["change"] >= 0 else notation.minus
    return f"{sign}{abs(100 * price['change']):.1f}{notation.plus_minus}{100 * price['standard_error']:.1f}{notation.percent}"


def layout(results: Results, notation: Notation) -> pandas.DataFrame:
    """The table as text: systems as rows, (evaluation set, context length) as columns, each followed by the retrieval accuracy
    if it was measured at that length. The last columns of an evaluation set are the LongPPL at the longest length, and the
    change from the base model at a short length.
    """
    cells = results.cells
    best = statistically_best(results.measured, results.pairs)
    warned = low_perplexity_poor_retrieval(results.measured, results.retrieval)
    accuracies = {(cell["label"], cell["eval_length"]): cell["accuracy"] for cell in results.retrieval.to_dict("records")}
    retrieval_lengths = {length for _, length in accuracies}
    by_place = {(cell["label"], cell["dataset_label"], cell["eval_length"]): cell for cell in cells.to_dict("records")}
    longppl, best_longppl = results.longppl, statistically_best(results.longppl, results.key_pairs)
    by_row = {(cell["label"], cell["dataset_label"]): cell for cell in longppl.to_dict("records")}
    prices, short = {}, None
    for price in results.prices.to_dict("records"):
        prices[price["label"], price["dataset_label"]], short = price, price["eval_length"]
    rows: dict[str, dict[tuple[str, str], str]] = {}
    for label in cells["label"].unique():
        row: dict[tuple[str, str], str] = {}
        for dataset in cells["dataset_label"].unique():
            for length in sorted(cells["eval_length"].unique()):
                place = (label, dataset, length)
                row[dataset, str(length)] = format_cell(by_place[place], notation, place in best) if place in by_place else "–"
                if length in retrieval_lengths:
                    accuracy = accuracies.get((label, length))
                    text = "–" if accuracy is None else f"{100 * accuracy:.0f}{notation.percent}"
                    row[dataset, f"retrieval at {length}"] = text + (notation.warning if place in warned else "")
            if by_row:
                place, cell = (label, dataset, longppl["eval_length"].iloc[0]), by_row.get((label, dataset))
                row[dataset, f"LongPPL at {place[2]}"] = format_cell(cell, notation, place in best_longppl) if cell else "–"
            if prices:
                row[dataset, f"change at {short}"] = format_price(prices.get((label, dataset)), notation)
        rows[label] = row
    columns = list(next(iter(rows.values())))
    table = pandas.DataFrame(rows.values(), index=pandas.Index(rows, name="system"))
    table.columns = pandas.MultiIndex.from_tuples(columns, names=["evaluation set", "context length"])
    return table


def write_csv(path: str, results: Results) -> None:
    """One line per cell with everything in its record, and the retrieval accuracy at its context length."""
    cells = results.cells
    if len(results.retrieval):
        accuracies = results.retrieval[["label", "eval_length", "accuracy"]]
        accuracies = accuracies.rename(columns={"accuracy": "retrieval_accuracy"})
        cells = cells.merge(accuracies, how="left", on=["label", "eval_length"])
    cells.drop(columns="loss_by_position").to_csv(path, index=False)


def write_markdown(path: str, results: Results, title: str | None = None) -> None:
    """One table for each evaluation set, and the caption below as a list."""
    table, parts = layout(results, MARKDOWN), [f"# {title}"] if title else []
    for dataset in table.columns.unique(0):
        parts.append(f"**{dataset}**\n\n" + markdown_table(pandas.DataFrame(table[dataset])))
    Path(path).write_text("\n\n".join([*parts, markdown_list(results.caption(MARKDOWN))]) + "\n", encoding="utf-8")


def write_latex(path: str, results: Results, reference: str, title: str | None = None) -> None:
    """One table (booktabs) with the evaluation sets side by side.

    Args:
        path: file to write.
        results: what the table shows.
        reference: the table's ``\\label``.
        title: beginning of the caption.
    """
    table = layout(results, LATEX).rename(index=escape_latex, columns=escape_latex)
    table = table.replace({">1000": "$>$1000"}, regex=True)
    caption = " ".join(results.caption(LATEX))
    text = table.to_latex(
        escape=False,
        caption=f"{escape_latex(title)}. {caption}" if title else caption,
        label=reference,
        multicolumn_format="c",
        column_format="l" + "r" * table.shape[1],
    )
    Path(path).write_text(text, encoding="utf-8")


def render_table(results: Results, *, csv: str, markdown: str, latex: str, differences_csv: str) -> None:
    """Write the table of an experiment as CSV, Markdown and LaTeX, and the paired differences (of all tokens and
    of the key tokens) as CSV."""
    pairs = {"all": results.pairs, "key": results.key_pairs}
    pandas.concat([part.assign(tokens=tokens) for tokens, part in pairs.items()]).to_csv(differences_csv, index=False)
    write_csv(csv, results)
    write_markdown(markdown, results)
    write_latex(latex, results, "tab:perplexity")
