"""Tables of perplexity: one row a system, one column a context length, per evaluation set."""

import json
from pathlib import Path

import pandas


def read_records(paths: list[str]) -> pandas.DataFrame:
    """One row a cell from the JSON records of the evaluation, in the order given."""
    return pandas.DataFrame([json.loads(Path(path).read_text()) for path in paths])


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
                "context_length": int(length),
                "perplexity": value,
            }
            for row in published
            for length, value in row["perplexity"].items()
        ],
        columns=["label", "dataset_label", "context_length", "perplexity"],
    )


def perplexity_table(cells: pandas.DataFrame) -> pandas.DataFrame:
    """Perplexity with systems as rows and (evaluation set, context length) as columns, both in the order of ``cells``."""
    table = cells.pivot(index="label", columns=["dataset_label", "context_length"], values="perplexity")
    columns = pandas.MultiIndex.from_product(
        [cells["dataset_label"].unique(), sorted(cells["context_length"].unique())], names=["evaluation set", "context length"]
    )
    return table.reindex(index=cells["label"].unique(), columns=columns).rename_axis(index="system")


def format_perplexity(value: float) -> str:
    """Two decimals; ``>1000`` for what is off the scale, as in the paper; a dash where nothing was measured."""
    if pandas.isna(value):
        return "–"
    return ">1000" if value > 1000 else f"{value:.2f}"


def render_table(records: list[str], published: list[dict], csv: str, markdown: str, latex: str) -> pandas.DataFrame:
    """Write the table as CSV (one line a cell, all of the record), Markdown and LaTeX (booktabs) and return it.

    Args:
        records: paths of JSON records.
        published: reference rows, see :func:`published_records`.
        csv, markdown, latex: paths to write.
    """
    measured = read_records(records)
    cells = pandas.concat([measured, published_records(published)], ignore_index=True)
    cells.to_csv(csv, index=False)
    text = perplexity_table(cells).map(format_perplexity)
    protocol = "window = stride" if (measured["window"] == measured["stride"]).all() else "the stride is in the CSV"
    caption = (
        f"Perplexity by context length; {protocol}; precision {', '.join(measured['precision'].unique())}; "
        "every token but the first of a set is scored once."
    )
    others = measured.loc[measured["has_own_tokenizer"], "label"].unique()
    if len(others):
        caption += f" Per token of its own tokenizer, not of the base model's: {', '.join(others)}."
    parts = [
        f"**{dataset}**\n\n"
        + text[dataset].to_markdown(colalign=["left"] + ["right"] * text[dataset].shape[1], disable_numparse=True)
        for dataset in cells["dataset_label"].unique()
    ]
    Path(markdown).write_text("\n\n".join([*parts, caption]) + "\n", encoding="utf-8")
    column_format = "l" + "r" * text.shape[1]
    latex_text = text.to_latex(
        escape=True, caption=caption, label="tab:perplexity", multicolumn_format="c", column_format=column_format
    )
    Path(latex).write_text(latex_text, encoding="utf-8")
    return text
