"""Loss curves of the trained systems, from their training cards: a table of every logged step, and a plot."""

import json
from pathlib import Path

import pandas
from matplotlib.ticker import MaxNLocator

from longqlora.reporting.figures import panels_for

TITLES = {"corpus": "training texts", "sft": "answers of the instruction set"}


def read_traces(cards: dict[str, str]) -> pandas.DataFrame:
    """One row per system and logged step: label, data, step, loss (nats per token), learning_rate, grad_norm.

    Args:
        cards: path of the training card by label.
    """
    rows = []
    for label, path in cards.items():
        card = json.loads(Path(path).read_text())
        rows += [{"label": label, "data": card["settings"]["data"], **step} for step in card["trace"]]
    return pandas.DataFrame(rows, columns=["label", "data", "step", "loss", "learning_rate", "grad_norm"])


def plot_loss(cards: dict[str, str], csv: str, outputs: list[str]) -> None:
    """Write the traces as CSV and draw the losses, one panel per kind of training data.

    Args:
        cards: path of the training card by label.
        csv: path of the table.
        outputs: image files, the format by their suffix.
    """
    traces = read_traces(cards)
    traces.to_csv(csv, index=False)
    kinds = traces["data"].unique() if len(traces) else ["corpus"]
    with panels_for(outputs, (5 * len(kinds), 4), len(kinds)) as panels:
        for axes, kind in zip(panels, kinds, strict=True):
            for label, rows in traces[traces["data"] == kind].groupby("label", sort=False):
                axes.plot(rows["step"], rows["loss"], marker="." if len(rows) < 60 else None, label=label)
            axes.set(title=f"loss on {TITLES[kind]}", xlabel="optimizer step")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.3)
            if len(traces):
                axes.legend(frameon=False)
        panels[0].set_ylabel("cross-entropy (nats per token)")
