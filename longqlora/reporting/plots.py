"""Plots of perplexity against the context length, and of the loss against the position in the window."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import cycle
from textwrap import wrap
from typing import Any

import pandas
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from longqlora.reporting.figures import COLORS, GRAY, panels_for
from longqlora.reporting.notation import format_perplexity
from longqlora.reporting.records import PUBLISHED, Labels, longppl_of, mean_over_seeds, published_records, read_records

CLIPPING_RATIO = 2  # values above this many times the best one may lie outside the panel
SMALLEST_RANGE = 1.5  # height of a panel relative to its lowest value, at least: small differences should look small
HEADROOM = 1.05  # height of a panel relative to the largest value that has to be inside
INCHES_PER_LABEL = 3  # width of a legend entry
MARKERS = "osD^vPX"  # a number without a common divisor with that of the colors
MOST_DIRECT_LABELS = 8  # with more lines, or longer labels, a legend is clearer
LONGEST_DIRECT_LABEL = 34
LONGEST_IN_LEGEND = 44  # characters in a line
LINE_HEIGHT = 0.055  # of a direct label, relative to the panel
INCHES_PER_CHARACTER = 0.075


def colors_of(labels: Iterable[str]) -> dict[str, Any]:
    """A color for each label; gray for those of the literature."""
    measured = [label for label in labels if not label.endswith(PUBLISHED)]
    return dict.fromkeys(labels, GRAY) | dict(zip(measured, cycle(COLORS), strict=False))


def upper_limit(cells: pandas.DataFrame, x: str = "eval_length", value: str = "perplexity") -> float:
    """Upper limit of the y axis: all values are inside except those above :data:`CLIPPING_RATIO` times the best at their x."""
    best = cells.groupby(x)[value].transform("min")
    return HEADROOM * cells.loc[cells[value] <= CLIPPING_RATIO * best, value].max()


def use_log2_axis(axes, values: Iterable[int]) -> None:
    """Make the x axis logarithmic, with a tick and its number at each value."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(values)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)


def draw_panel(axes, cells: pandas.DataFrame, colors: dict[str, Any], x: str = "eval_length") -> None:
    """Draw one evaluation set: one line per label over a log₂ axis, dotted where it leads beyond the model's context; values
    above the panel are written at its upper edge."""
    for number, (label, rows) in enumerate(cells.groupby("label", sort=False)):
        rows = rows.sort_values(x)
        style = {"color": colors[str(label)], "marker": MARKERS[number % len(MARKERS)]}
        inside = rows.get("is_within_context", pandas.Series(dtype=object)).reindex(rows.index).ne(False)
        draw_line(axes, rows[inside], x, **style, label=label, linestyle="--" if str(label).endswith(PUBLISHED) else "-")
        beyond = ~inside | (~inside).shift(-1, fill_value=False)  # with the last point inside, where the dotted line begins
        draw_line(axes, rows[beyond], x, **style, linestyle=":")
    lowest = cells["perplexity"].min()
    top = max(upper_limit(cells, x), SMALLEST_RANGE * lowest)
    axes.set_ylim(lowest * 0.95, top)
    write_clipped_values(axes, cells[cells["perplexity"] > top], colors, x, top, cells[x].min())
    use_log2_axis(axes, cells[x].unique())
    axes.set_title(cells["dataset_label"].iloc[0])


def draw_line(axes, rows: pandas.DataFrame, x: str, **style) -> None:
    """Draw perplexities with their standard errors, where there are any."""
    errors = rows.get("standard_error", pandas.Series(dtype=float)).reindex(rows.index).astype(float).fillna(0)
    axes.errorbar(
        rows[x], rows["perplexity"], yerr=rows["perplexity"] * errors, markersize=5, elinewidth=0.8, capsize=2, **style
    )


def write_clipped_values(axes, cells: pandas.DataFrame, colors: dict[str, Any], x: str, top: float, leftmost: float) -> None:
    """Write the perplexities of cells above the panel at its upper edge, those at the same x below each other.

    Args:
        axes: the panel.
        cells: cells above the panel.
        colors: color by label.
        x: column on the x axis.
        top: upper limit of the panel.
        leftmost: smallest x of the panel; there the numbers are written to the left of the line, elsewhere to the right.
    """
    for place, rows in cells.groupby(x):
        for line, row in enumerate(rows.sort_values("perplexity", ascending=False).to_dict("records")):
            axes.annotate(
                f"{format_perplexity(row['perplexity'])} ↑", (place, top), textcoords="offset points",
                xytext=(-4 if place == leftmost else 4, -4 - 12 * line), ha="left" if place == leftmost else "right", va="top",
                fontsize=8, color=colors[row["label"]], bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip


def draw_panels(cells: pandas.DataFrame, outputs: list[str], x: str, x_label: str) -> None:
    """Draw one panel per evaluation set, with one line per label, which is written beside the line or in a legend below.

    Args:
        cells: measured or published perplexities, see :func:`longqlora.reporting.records.read_records`.
        outputs: image files to write, in the format of their suffix.
        x: column on the x axis.
        x_label: label of the x axis.
    """
    datasets = cells["dataset_label"].unique()
    colors = colors_of(cells["label"].unique())
    last = cells[(cells["dataset_label"] == datasets[-1]) & (cells[x] == cells[x].max())]
    ends = last.sort_values("perplexity").set_index("label")["perplexity"]
    with panels_with_labels(outputs, len(datasets), list(colors), list(ends.index)) as (panels, is_direct):
        for axes, dataset in zip(panels, datasets, strict=True):
            draw_panel(axes, cells[cells["dataset_label"] == dataset], colors, x)
            axes.set_xlabel(x_label)
        panels[0].set_ylabel("perplexity (± standard error)")
        if is_direct:
            write_direct_labels(panels[-1], ends.to_dict(), colors)


@contextmanager
def panels_with_labels(outputs: list[str], num_panels: int, labels: list[str], ends: list[str]) -> Iterator:
    """Panels side by side, and whether the caller is to write the labels beside the lines of the last one; otherwise, a legend
    is below the panels.

    Args:
        outputs: image files to write, in the format of their suffix.
        num_panels: number of panels.
        labels: of the lines.
        ends: labels of the lines that reach the right edge of the last panel.
    """
    width, longest = max(7, 5 * num_panels), max(map(len, labels))
    is_direct = set(ends) == set(labels) and len(labels) <= MOST_DIRECT_LABELS and longest <= LONGEST_DIRECT_LABEL
    columns = min(len(labels), int(width / INCHES_PER_LABEL))
    wrapped = {label: "\n".join(wrap(label, LONGEST_IN_LEGEND)) for label in labels}
    lines = math.ceil(len(labels) / columns) + sum(label.count("\n") for label in wrapped.values())
    height = 4 if is_direct else 4 + 0.25 * lines
    with panels_for(outputs, (width + is_direct * INCHES_PER_CHARACTER * longest, height), num_panels) as panels:
        yield panels, is_direct
        if not is_direct:
            handles, shown = panels[0].get_legend_handles_labels()
            shown = [wrapped[label] for label in shown]
            panels[0].figure.legend(handles, shown, loc="outside lower center", ncols=columns, frameon=False)


def write_direct_labels(axes, ends: dict[str, float], colors: dict[str, Any]) -> None:
    """Write each label to the right of its line, in its color, and none on another.

    Args:
        axes: the panel.
        ends: value at the right end of each line, in ascending order; those above the panel leave it at its upper edge.
        colors: color by label.
    """
    low, top = axes.get_ylim()
    places: list[float] = []
    for value in ends.values():
        above = places[-1] + LINE_HEIGHT if places else 0
        places.append(max((min(value, top) - low) / (top - low), above))
    highest = 1.0
    for number in reversed(range(len(places))):
        places[number] = min(places[number], highest)
        highest = places[number] - LINE_HEIGHT
    for label, place in zip(ends, places, strict=True):
        axes.annotate(
            label, (1, place), xycoords="axes fraction", textcoords="offset points", xytext=(6, 0), va="center", fontsize=9,
            color=colors[label], annotation_clip=False,
        )  # fmt: skip


def plot_perplexity(records: list[str], labels: Labels, published: list[dict], outputs: list[str]) -> None:
    """Draw perplexity against context length, one panel per evaluation set, and one more for its LongPPL if that is measured.

    Args:
        records: JSON records of perplexity.
        labels: names of systems and evaluation sets in the plot.
        published: rows from the literature, drawn dashed, see :func:`longqlora.reporting.records.published_records`.
        outputs: image files to write, in the format of their suffix.
    """
    measured = mean_over_seeds(read_records(records, labels))
    longppl = longppl_of(measured)
    longppl = longppl.assign(dataset_label=longppl["dataset_label"] + ", LongPPL")
    cells = pandas.concat([measured, published_records(published), longppl], ignore_index=True)
    draw_panels(cells, outputs, "eval_length", "context length (tokens)")


def loss_by_position(cells: pandas.DataFrame) -> pandas.DataFrame:
    """Mean loss by the number of preceding tokens in the window.

    Args:
        cells: see :func:`longqlora.reporting.records.read_records`.

    Returns:
        One row per cell and position bin: label, dataset_label, eval_length, tokens_before (the smallest of the bin),
        num_scored, mean_nll (nats).
    """
    keys = ["label", "dataset_label", "eval_length"]
    parts = [
        pandas.DataFrame(cell["loss_by_position"]).assign(**{key: cell[key] for key in keys})
        for cell in cells.to_dict("records")
    ]
    losses = pandas.concat(parts)
    losses["mean_nll"] = losses["nll"] / losses["num_scored"]
    return losses[[*keys, "tokens_before", "num_scored", "mean_nll"]]


def plot_loss_by_position(losses: pandas.DataFrame, outputs: list[str]) -> None:
    """Draw the mean loss against the position in the window at the longest context length, one panel per evaluation set.

    Args:
        losses: see :func:`loss_by_position`.
        outputs: image files to write, in the format of their suffix.
    """
    losses = losses[losses["eval_length"] == losses["eval_length"].max()]
    datasets, colors = losses["dataset_label"].unique(), colors_of(losses["label"].unique())
    last = losses[losses["dataset_label"] == datasets[-1]].sort_values("tokens_before").groupby("label")["mean_nll"].last()
    ends = last.sort_values().to_dict()
    with panels_with_labels(outputs, len(datasets), list(colors), list(ends)) as (panels, is_direct):
        for axes, dataset in zip(panels, datasets, strict=True):
            here = losses[losses["dataset_label"] == dataset]
            for label, rows in here.groupby("label", sort=False):
                axes.plot(rows["tokens_before"], rows["mean_nll"], label=label, color=colors[str(label)])
            late = here[here["tokens_before"] >= here["tokens_before"].max() / 64]  # the first losses are far above the others
            axes.set_ylim(0.95 * late["mean_nll"].min(), upper_limit(late, "tokens_before", "mean_nll"))
            use_log2_axis(axes, [2**power for power in range(int(here["tokens_before"].max()).bit_length())])
            axes.set_xlabel("preceding tokens in the window")
            axes.set_title(f"{dataset}, {here['eval_length'].iloc[0]} tokens")
        panels[0].set_ylabel("mean negative log-likelihood (nats)")
        if is_direct:
            write_direct_labels(panels[-1], ends, colors)
