"""Loss curves of the trained systems, from their training cards: a table with every logged step, and a plot."""

import json
from pathlib import Path

import pandas
from matplotlib.ticker import MaxNLocator

from longqlora.reporting.figures import panels_for

TITLES = {"corpus": "training texts", "sft": "answers of the instruction set"}


def read_traces(cards: dict[str, str]) -> pandas.DataFrame:
    """Read the losses that the trainings logged.

    Args:
        cards: training card (JSON) by the label of its system.

    Returns:
        One row per system and logged step: label, data, step, loss (nats per token), learning_rate, grad_norm.
    """
    rows: list[dict] = []
    for label, path in cards.items():
        card = json.loads(Path(path).read_text(encoding="utf-8"))
        rows += [{"label": label, "data": card["settings"]["data"], **step} for step in card["trace"]]
    return pandas.DataFrame(rows, columns=["label", "data", "step", "loss", "learning_rate", "grad_norm"])


def plot_loss(cards: dict[str, str], csv: str, outputs: list[str]) -> None:
    """Write every logged step as CSV, and draw the losses, one panel per kind of training data.

    Args:
        cards: training card (JSON) by the label of its system.
        csv: file to write.
        outputs: image files to write, in the format of their suffix.
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
