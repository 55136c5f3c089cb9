"""Plots of perplexity against context length."""

import pandas
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from longqlora.figures import panels_for
from longqlora.tables import format_perplexity, published_records, read_records

HEADROOM = 1.3  # of the frame above the best system's worst value
MARKERS = "osD^vP*X"


def frame_top(cells: pandas.DataFrame) -> float:
    """Upper edge of a panel: at each length the best system is well inside; a system that breaks leaves the frame."""
    return HEADROOM * cells.groupby("context_length")["perplexity"].min().max()


def draw_panel(axes, cells: pandas.DataFrame, colours: dict[str, str]) -> None:
    """One evaluation set: a line a system on a log₂ axis; where a line leaves the frame, its value stands at the edge."""
    top = frame_top(cells)
    for number, (label, rows) in enumerate(cells.groupby("label", sort=False)):
        rows = rows.sort_values("context_length")
        style = {"linestyle": "--" if label.endswith("(published)") else "-", "marker": MARKERS[number % len(MARKERS)]}
        axes.plot(rows["context_length"], rows["perplexity"], color=colours[label], markersize=5, label=label, **style)
    axes.set_ylim(cells["perplexity"].min() * 0.95, top)
    first = cells["context_length"].min()
    for length, rows in cells[cells["perplexity"] > top].groupby("context_length"):
        for line, row in enumerate(rows.sort_values("perplexity", ascending=False).itertuples()):
            axes.annotate(
                f"{format_perplexity(row.perplexity)} ↑", (length, top), xytext=(-4 if length == first else 4, -4 - 12 * line),
                textcoords="offset points", ha="left" if length == first else "right", va="top", fontsize=8,
                color=colours[row.label], bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(cells["context_length"].unique())))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("context length (tokens)")
    axes.set_title(cells["dataset_label"].iloc[0])
    axes.grid(alpha=0.3)


def plot_perplexity(records: list[str], published: list[dict], outputs: list[str]) -> None:
    """Draw perplexity against context length, one panel an evaluation set, and write it to each path of ``outputs``.

    Args:
        records: paths of JSON records.
        published: reference rows, see :func:`longqlora.tables.published_records`; dashed.
        outputs: image files, the format by their suffix.
    """
    cells = pandas.concat([read_records(records), published_records(published)], ignore_index=True)
    datasets = cells["dataset_label"].unique()
    colours = {label: f"C{number % 10}" for number, label in enumerate(cells["label"].unique())}
    with panels_for(outputs, (5 * len(datasets), 4.2), len(datasets)) as panels:
        for axes, dataset in zip(panels, datasets, strict=True):
            draw_panel(axes, cells[cells["dataset_label"] == dataset], colours)
        panels[0].set_ylabel("perplexity")
        handles, labels = panels[0].get_legend_handles_labels()
        panels[0].figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
