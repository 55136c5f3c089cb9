"""Table and heat map of retrieval accuracy by context length, task and depth."""

from pathlib import Path
from textwrap import wrap

import pandas

from longqlora.reporting.figures import panels_for
from longqlora.reporting.records import Labels, chat_sentences, read_records


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
        text = table.to_markdown(colalign=["left"] + ["right"] * table.shape[1], disable_numparse=True)
        counted = f"mean over {questions} questions at {rows['depth'].nunique()} depths"
        parts.append(f"**{str(task).replace('_', ' ')}**, {counted}\n\n{text}")
    parts += chat_sentences(cells)
    Path(markdown).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def plot_retrieval(cells: pandas.DataFrame, outputs: list[str]) -> None:
    """Draw retrieval accuracy as heat maps of depth and context length: one column per system, one row per task.

    Args:
        cells: see :func:`read_retrieval`.
        outputs: image files to write, in the format of their suffix.
    """
    systems, tasks = cells["label"].unique(), cells["task"].unique()
    size = (1.6 * len(systems) + 2, 2 * len(tasks) + 1)
    with panels_for(outputs, size, len(systems), rows=len(tasks)) as panels:
        for number, axes in enumerate(panels):
            task, system = tasks[number // len(systems)], systems[number % len(systems)]
            here = cells[(cells["task"] == task) & (cells["label"] == system)]
            table = here.pivot(index="depth", columns="eval_length", values="accuracy")
            draw_heat_map(axes, table)
            is_left = number % len(systems) == 0
            axes.set_yticks(range(table.shape[0]), [f"{100 * depth:.0f} %" if is_left else "" for depth in table.index])
            axes.set_title("\n".join(wrap(system, 18)) if number < len(systems) else "", fontsize=9)
            axes.set_ylabel(f"{task.replace('_', ' ')}\ndepth" if is_left else "")
        panels[0].figure.supxlabel("context length (tokens)", fontsize=10)
        colors = panels[0].images[0]
        panels[0].figure.colorbar(colors, ax=panels, label="accuracy (%)", format=lambda share, _: f"{100 * share:.0f}")


def draw_heat_map(axes, table: pandas.DataFrame) -> None:
    """Draw accuracies as colors and as numbers in percent, ``[depths, context lengths]``."""
    axes.imshow(table, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for row, shares in enumerate(table.to_numpy()):
        for column, share in enumerate(shares):
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(table.shape[1]), table.columns)
