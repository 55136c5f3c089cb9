"""Table and heat map of retrieval accuracy by context length, task and depth."""

import math
from pathlib import Path
from textwrap import wrap

import pandas

from longqlora.reporting.figures import panels_for
from longqlora.reporting.notation import markdown_table
from longqlora.reporting.records import Labels, chat_sentences, read_records

MOST_IN_A_ROW = 6  # systems beside each other in the plot


def read_retrieval(paths: list[str], labels: Labels) -> pandas.DataFrame:
    """Read the JSON records of retrieval.

    Args:
        paths: the records.
        labels: names of the systems in tables and plots.

    Returns:
        One row per record, task and depth: label, eval_length, rope_scaling, rope_factor, target_context, chat_template, task,
        depth, accuracy, samples.
    """
    shared = ("label", "eval_length", "rope_scaling", "rope_factor", "target_context", "chat_template")
    measured = ("task", "depth", "accuracy", "samples")
    return pandas.DataFrame(
        [
            {key: record[key] for key in shared} | {key: cell[key] for key in measured}
            for record in read_records(paths, labels).to_dict("records")
            for cell in record["cells"]
        ]
    )


def render_retrieval(cells: pandas.DataFrame, *, csv: str, markdown: str) -> None:
    """Write retrieval accuracy as CSV (one line per task and depth) and as Markdown (one table per task, with means over
    depths).

    Args:
        cells: see :func:`read_retrieval`.
        csv, markdown: files to write.
    """
    cells.to_csv(csv, index=False)
    parts = ["# Retrieval accuracy"]
    for task, rows in cells.groupby("task", sort=False):
        table = rows.pivot_table(index="label", columns="eval_length", values="accuracy", sort=False)
        table = table.rename_axis(index="system").map(lambda share: f"{100 * share:.0f} %")
        questions = rows.groupby(["label", "eval_length"])["samples"].sum().iloc[0]
        counted = f"mean over {questions} questions at {rows['depth'].nunique()} depths"
        parts.append(f"**{str(task).replace('_', ' ')}**, {counted}\n\n{markdown_table(table)}")
    parts += chat_sentences(cells)
    Path(markdown).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def plot_retrieval(cells: pandas.DataFrame, outputs: list[str]) -> None:
    """Draw retrieval accuracy as heat maps of depth and context length: a column per system and a row per task; systems beyond
    :data:`MOST_IN_A_ROW` are below the first ones.

    Args:
        cells: see :func:`read_retrieval`.
        outputs: image files to write, in the format of their suffix.
    """
    systems, tasks = cells["label"].unique(), cells["task"].unique()
    bands = math.ceil(len(systems) / MOST_IN_A_ROW)
    columns, rows = math.ceil(len(systems) / bands), bands * len(tasks)
    with panels_for(outputs, (1.6 * columns + 2, 1.8 * rows + 0.5 * bands + 0.5), columns, rows=rows) as panels:
        for number, axes in enumerate(panels):
            (band, task), column = divmod(number // columns, len(tasks)), number % columns
            if (place := band * columns + column) >= len(systems):
                axes.set_axis_off()
                continue
            here = cells[(cells["task"] == tasks[task]) & (cells["label"] == systems[place])]
            table = here.pivot(index="depth", columns="eval_length", values="accuracy")
            draw_heat_map(axes, table)
            axes.set_yticks(range(table.shape[0]), [f"{100 * depth:.0f} %" if column == 0 else "" for depth in table.index])
            axes.set_title("\n".join(wrap(systems[place], 18)) if task == 0 else "", fontsize=9)
            axes.set_ylabel(f"{tasks[task].replace('_', ' ')}\ndepth" if column == 0 else "")
        panels[0].figure.supxlabel("context length (tokens)", fontsize=10)
        colors = panels[0].images[0]
        panels[0].figure.colorbar(colors, ax=panels, label="accuracy (%)", format=lambda share, _: f"{100 * share:.0f}")


def draw_heat_map(axes, table: pandas.DataFrame) -> None:
    """Draw accuracies as colors and as numbers in percent, ``[depths, context lengths]``."""
    axes.imshow(table, vmin=0, vmax=1, cmap="YlGnBu", aspect="auto")  # from light to dark, for all kinds of color vision
    for row, shares in enumerate(table.to_numpy()):
        for column, share in enumerate(shares):
            ink = "#1f2124" if share < 0.55 else "#fafaf8"
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=ink)
    axes.set_xticks(range(table.shape[1]), table.columns)
