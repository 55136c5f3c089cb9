"""Plots of the training data: lengths of the texts, and composition of the instruction set."""

import json
from pathlib import Path

import pandas
from matplotlib.ticker import StrMethodFormatter

from longqlora.reporting.figures import panels_for

BINS = 40
SHOWN_SOURCES = 8  # the largest ones; all others are shown together
SIZE = (7, 4.2)


def plot_text_lengths(texts: str, outputs: list[str]) -> None:
    """Draw a histogram of the texts' lengths in tokens, stacked by source.

    Args:
        texts: the sampled texts (Parquet with the columns source and num_tokens).
        outputs: image files to write, in the format of their suffix.
    """
    sample = pandas.read_parquet(texts, columns=["source", "num_tokens"])
    largest = sample["source"].value_counts().index[:SHOWN_SOURCES]
    sample["source"] = sample["source"].where(sample["source"].isin(largest), "others")
    groups = [(name, sample.loc[sample["source"] == name, "num_tokens"]) for name in sample["source"].value_counts().index]
    with panels_for(outputs, SIZE) as [axes]:
        labels = [f"{name} ({len(lengths):,})" for name, lengths in groups]
        axes.hist([lengths for _, lengths in groups], bins=BINS, stacked=True, label=labels)
        median = sample["num_tokens"].median()
        axes.axvline(median, color="black", linestyle="--", linewidth=1, label=f"median ({median:,.0f} tokens)")
        axes.set_xlabel("length of a text (tokens)")
        axes.set_ylabel("texts")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_title(f"{len(sample):,} texts, {sample['num_tokens'].sum():,} tokens")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)


def plot_sft_shares(card: str, outputs: list[str]) -> None:
    """Draw the sources' shares of an instruction set's records as a pie.

    Args:
        card: data card of the set (JSON).
        outputs: image files to write, in the format of their suffix.
    """
    content = json.loads(Path(card).read_text(encoding="utf-8"))
    taken = {name: source["taken"] for name, source in content["sources"].items() if source["taken"]}
    labels = [f"{name}: {number:,} ({number / content['records']:.0%})" for name, number in taken.items()]
    with panels_for(outputs, SIZE) as [axes]:  # the names are in a legend, because those of small slices would overlap
        wedges, _ = axes.pie(
            list(taken.values()), startangle=90, counterclock=False, wedgeprops={"edgecolor": "white", "linewidth": 1.5}
        )
        axes.figure.legend(wedges, labels, loc="outside right center", frameon=False)
        axes.set_title(f"{content['records']:,} records, {content['tokens']:,} tokens")
