"""Table and plot of an ablation: one row per combination of settings."""

import pandas

from longqlora.config.settings import Ablation
from longqlora.reporting.comparisons import differences
from longqlora.reporting.plots import draw_panels
from longqlora.reporting.records import Labels, longppl_of, published_records, read_records
from longqlora.reporting.tables import Results, write_latex, write_markdown

AXES = {
    "rank": "LoRA rank",
    "steps": "training steps",
    "rope_scaling": "RoPE scaling",
    "evaluation_attention": "attention in evaluation",
}
"""Settings that an ablation can vary, and their names in tables and plots."""


def name_of_cell(values: dict[str, int | str]) -> str:
    """The values of the axes as tables and plots show them: ``LoRA rank 16, training steps 25``."""
    return ", ".join(f"{AXES[axis]} {value}".replace("_", " ") for axis, value in values.items())


def read_ablation(records: list[str], ablation: Ablation, labels: Labels) -> pandas.DataFrame:
    """The records of an ablation, with one more column per axis, and the values of the axes as their label.

    Args:
        records: JSON records of perplexity.
        ablation: grid of settings.
        labels: names of the evaluation sets.
    """
    cells = read_records(records, labels)
    for axis in ablation.axes:
        cells[axis] = [ablation.rows[system][axis] for system in cells["system"]]
    cells["label"] = [name_of_cell(ablation.rows[system]) for system in cells["system"]]
    return cells


def render_ablation(cells: pandas.DataFrame, windows: list[str], title: str, *, csv: str, markdown: str, latex: str) -> None:
    """Write the table of an ablation as CSV, Markdown and LaTeX.

    Args:
        cells: see :func:`read_ablation`.
        windows: Parquet file with the losses of each cell's windows.
        title: title of the table.
        csv, markdown, latex: files to write.
    """
    key_pairs = differences(longppl_of(cells), windows, of_key_tokens=True)
    results = Results(cells, pandas.DataFrame(), published_records([]), differences(cells, windows), key_pairs=key_pairs)
    cells.drop(columns="loss_by_position").to_csv(csv, index=False)
    write_markdown(markdown, results, title)
    write_latex(latex, results, "tab:ablation", title)


def plot_ablation(cells: pandas.DataFrame, axes: list[str], outputs: list[str]) -> None:
    """Draw the perplexities of an ablation: against its first axis, with one line per context length, if that axis is numeric;
    otherwise against the context length, with one line per combination.

    Args:
        cells: see :func:`read_ablation`.
        axes: settings that are varied.
        outputs: image files to write, in the format of their suffix.
    """
    first, *others = axes
    if not pandas.api.types.is_numeric_dtype(cells[first]):
        draw_panels(cells, outputs, "eval_length", "context length (tokens)")
        return
    labels = [
        ", ".join(filter(None, [f"{row['eval_length']} tokens", name_of_cell({axis: row[axis] for axis in others})]))
        for row in cells.to_dict("records")
    ]
    draw_panels(cells.assign(label=labels), outputs, first, AXES[first])
