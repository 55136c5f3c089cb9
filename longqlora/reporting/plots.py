"""Plots of perplexity, of the loss by position, and of retrieval."""

import math
from contextlib import contextmanager
from textwrap import wrap

import pandas
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from longqlora.config.ablations import AXES, name_of_cell
from longqlora.reporting.figures import panels_for
from longqlora.reporting.tables import ablation_cells, format_perplexity, published_records, read_records, read_retrieval

BROKEN = 2  # times the best value: what is above it may leave the frame
HEADROOM = 1.05  # of the frame above what has to be inside
INCHES_PER_LABEL = 3  # of a legend
MARKERS = "osD^vP*X"


def frame_top(cells: pandas.DataFrame, x: str = "eval_length", value: str = "perplexity") -> float:
    """Upper edge of a panel: every system is inside it except where it breaks."""
    best = cells.groupby(x)[value].transform("min")
    return HEADROOM * cells.loc[cells[value] <= BROKEN * best, value].max()


def powers_of_two(axes, values) -> None:
    """A log₂ axis with a tick at each value, written out."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(values)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)


def draw_panel(axes, cells: pandas.DataFrame, colours: dict[str, str], x: str = "eval_length") -> None:
    """One evaluation set: a line a label on a log₂ axis; where a line leaves the frame, its value stands at the edge."""
    top = frame_top(cells, x)
    for number, (label, rows) in enumerate(cells.groupby("label", sort=False)):
        rows = rows.sort_values(x)
        style = {"linestyle": "--" if label.endswith("(published)") else "-", "marker": MARKERS[number % len(MARKERS)]}
        errors = rows.get("standard_error", pandas.Series(dtype=float)).reindex(rows.index).astype(float).fillna(0)
        axes.errorbar(
            rows[x], rows["perplexity"], yerr=rows["perplexity"] * errors, color=colours[label], markersize=5, label=label,
            elinewidth=0.8, capsize=2, **style,
        )  # fmt: skip
    axes.set_ylim(cells["perplexity"].min() * 0.95, top)
    first = cells[x].min()
    for place, rows in cells[cells["perplexity"] > top].groupby(x):
        for line, row in enumerate(rows.sort_values("perplexity", ascending=False).itertuples()):
            axes.annotate(
                f"{format_perplexity(row.perplexity)} ↑", (place, top), xytext=(-4 if place == first else 4, -4 - 12 * line),
                textcoords="offset points", ha="left" if place == first else "right", va="top", fontsize=8,
                color=colours[row.label], bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip
    powers_of_two(axes, cells[x].unique())
    axes.set_title(cells["dataset_label"].iloc[0])


def draw_panels(cells: pandas.DataFrame, outputs: list[str], x: str, x_label: str) -> None:
    """A panel an evaluation set, a line a label, one legend below."""
    datasets = cells["dataset_label"].unique()
    colours = {label: f"C{number % 10}" for number, label in enumerate(cells["label"].unique())}
    with panels_with_legend(outputs, len(datasets), len(colours)) as panels:
        for axes, dataset in zip(panels, datasets, strict=True):
            draw_panel(axes, cells[cells["dataset_label"] == dataset], colours, x)
            axes.set_xlabel(x_label)
        panels[0].set_ylabel("perplexity (± standard error)")


@contextmanager
def panels_with_legend(outputs: list[str], num_panels: int, num_labels: int):
    """Axes side by side, and below them one legend of what was drawn in the first."""
    width = max(7, 5 * num_panels)
    columns = min(num_labels, int(width / INCHES_PER_LABEL))
    with panels_for(outputs, (width, 4 + 0.25 * math.ceil(num_labels / columns)), num_panels) as panels:
        yield panels
        handles, labels = panels[0].get_legend_handles_labels()
        panels[0].figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def plot_perplexity(records: list[str], labels: dict[str, dict[str, str]], published: list[dict], outputs: list[str]) -> None:
    """Draw perplexity against context length, one panel an evaluation set, and write it to each path of ``outputs``.

    Args:
        records: paths of JSON records.
        labels: see :func:`longqlora.reporting.tables.read_records`.
        published: reference rows, see :func:`longqlora.reporting.tables.published_records`; dashed.
        outputs: image files, the format by their suffix.
    """
    cells = pandas.concat([read_records(records, labels), published_records(published)], ignore_index=True)
    draw_panels(cells, outputs, "eval_length", "context length (tokens)")


def plot_ablation(records: list[str], ablation: dict, labels: dict[str, dict[str, str]], outputs: list[str]) -> None:
    """Draw the perplexity of a grid: against its first axis, a line a context length, if that is a number; else against the
    context length, a line a combination.

    Args:
        records: paths of JSON records.
        labels: see :func:`longqlora.reporting.tables.read_records`.
        ablation: label, axes and rows, see :func:`longqlora.config.ablations.add_ablations`.
        outputs: image files, the format by their suffix.
    """
    cells = ablation_cells(records, ablation, labels)
    first, *others = ablation["axes"]
    if not pandas.api.types.is_numeric_dtype(cells[first]):
        draw_panels(cells, outputs, "eval_length", "context length (tokens)")
        return
    cells["label"] = [
        ", ".join(filter(None, [f"{row['eval_length']} tokens", name_of_cell({axis: row[axis] for axis in others})]))
        for _, row in cells.iterrows()
    ]
    draw_panels(cells, outputs, first, AXES[first])


def plot_loss_by_position(records: list[str], labels: dict[str, dict[str, str]], csv: str, outputs: list[str]) -> None:
    """Draw the mean loss against the position in the window, at the longest context length, one panel an evaluation set.

    Args:
        records: paths of JSON records.
        labels: see :func:`longqlora.reporting.tables.read_records`.
        csv: path to write the means of all context lengths to.
        outputs: image files, the format by their suffix.
    """
    cells = read_records(records, labels)
    named = ["label", "dataset_label", "eval_length"]
    losses = pandas.concat(
        [
            pandas.DataFrame(cell["loss_by_position"]).assign(**{name: cell[name] for name in named})
            for _, cell in cells.iterrows()
        ]
    )
    losses["mean_nll"] = losses["nll"] / losses["num_scored"]
    losses[[*named, "tokens_before", "num_scored", "mean_nll"]].to_csv(csv, index=False)
    losses = losses[losses["eval_length"] == losses["eval_length"].max()]
    datasets = losses["dataset_label"].unique()
    with panels_with_legend(outputs, len(datasets), losses["label"].nunique()) as panels:
        for axes, dataset in zip(panels, datasets, strict=True):
            here = losses[losses["dataset_label"] == dataset]
            for label, rows in here.groupby("label", sort=False):
                axes.plot(rows["tokens_before"], rows["mean_nll"], label=label)
            late = here[here["tokens_before"] >= here["tokens_before"].max() / 64]  # the first few are far above all others
            axes.set_ylim(0.95 * late["mean_nll"].min(), frame_top(late, "tokens_before", "mean_nll"))
            powers_of_two(axes, [2**power for power in range(int(here["tokens_before"].max()).bit_length())])
            axes.set_xlabel("tokens before it in the window")
            axes.set_title(f"{dataset}, {here['eval_length'].iloc[0]} tokens")
        panels[0].set_ylabel("mean negative log-likelihood (nats)")


def plot_retrieval(records: list[str], labels: dict[str, dict[str, str]], outputs: list[str]) -> None:
    """Draw retrieval accuracy as heat maps of context length and depth: a column a system, a row a task.

    Args:
        records: paths of JSON records of retrieval.
        outputs: image files, the format by their suffix.
    """
    cells = read_retrieval(records, labels)
    systems, tasks = cells["label"].unique(), cells["task"].unique()
    size = (1.6 * len(systems) + 2, 2 * len(tasks) + 1)
    with panels_for(outputs, size, len(systems), rows=len(tasks)) as panels:
        for number, axes in enumerate(panels):
            task, system = tasks[number // len(systems)], systems[number % len(systems)]
            here = cells[(cells["task"] == task) & (cells["label"] == system)]
            table = here.pivot(index="depth", columns="eval_length", values="accuracy")
            image = axes.imshow(table, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            for row, shares in enumerate(table.to_numpy()):
                for column, share in enumerate(shares):
                    axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8)
            axes.set_xticks(range(table.shape[1]), table.columns)
            is_left = number % len(systems) == 0
            axes.set_yticks(range(table.shape[0]), [f"{100 * depth:.0f} %" if is_left else "" for depth in table.index])
            axes.set_title("\n".join(wrap(system, 18)) if number < len(systems) else "", fontsize=9)
            axes.set_ylabel(f"{task.replace('_', ' ')}\ndepth" if is_left else "")
        panels[0].figure.supxlabel("context length (tokens)", fontsize=10)
        panels[0].figure.colorbar(image, ax=panels, label="found (%)", format=lambda share, _: f"{100 * share:.0f}")
