"""Table of the losses on the answers of held-out conversations, before and after a fine-tuning, and files of sample answers."""

import json
import math
from pathlib import Path

import pandas

from longqlora.evaluation.statistics import CONFIDENCE, ratio_estimate
from longqlora.reporting.notation import LATEX, MARKDOWN, Notation, escape_latex, format_perplexity, markdown_table

SHOWN_CHARACTERS = 600  # of a question in a file of sample answers; the record has the whole question
CAPTION = (
    "Mean negative log-likelihood (nats per token) of the answers in conversations that were held out of the fine-tuning: "
    "before it (the model that was fine-tuned, with the same RoPE scaling) and after it. {plus_minus} is the standard error "
    "over conversations; the difference is paired by conversation, with its {confidence:.0f}{percent} confidence interval. "
    "Weights: {precisions}."
)


def read_answers(records: list[str], labels: dict[str, str]) -> pandas.DataFrame:
    """Read the records of all fine-tuned systems and estimate their mean losses.

    Args:
        records: JSON files, see :func:`longqlora.evaluation.answers.evaluate_answers`.
        labels: names in the table, by the names of the systems.

    Returns:
        One row per system: label; num_conversations; num_tokens, of the answers; the mean losses (nats per token) before and
        after the fine-tuning with their standard errors and perplexities; their paired difference (below 0 if the fine-tuning
        has lowered the loss), its standard error, low and high (confidence interval), and significant (whether the interval
        excludes 0); precision, rope_scaling, rope_factor and target_context of the system.
    """
    rows = []
    for path in records:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        described = {key: record[key] for key in ("precision", "rope_scaling", "rope_factor", "target_context")}
        measured = estimate_losses(pandas.DataFrame(record["conversations"]))
        rows.append({"system": record["system"], "label": labels[record["system"]], **measured, **described})
    return pandas.DataFrame(rows)


def estimate_losses(conversations: pandas.DataFrame) -> dict:
    """Mean losses before and after a fine-tuning, and their paired difference; conversations are the sampling units.

    Args:
        conversations: one row per conversation: num_tokens of its answers, nll_before and nll_after (summed, in nats).
    """
    tokens = conversations["num_tokens"].to_numpy()
    before, after = (conversations[name].to_numpy() for name in ("nll_before", "nll_after"))
    estimates = {"before": ratio_estimate(before, tokens), "after": ratio_estimate(after, tokens)}
    difference = ratio_estimate(after - before, tokens)
    interval = difference.interval()
    low, high = interval or (math.nan, math.nan)
    columns: dict = {"num_conversations": len(conversations), "num_tokens": int(tokens.sum())}
    for name, estimate in estimates.items():
        columns[f"mean_nll_{name}"] = estimate.mean
        columns[f"standard_error_{name}"] = estimate.standard_error
        columns[f"perplexity_{name}"] = math.exp(estimate.mean)
    columns |= {"difference": difference.mean, "standard_error": difference.standard_error, "low": low, "high": high}
    return columns | {"significant": interval is not None and not low <= 0 <= high}


def format_loss(mean: float, standard_error: float | None, notation: Notation) -> str:
    """A mean loss, or a difference of two, with its standard error unless that is missing."""
    text = f"{mean:.3f}".replace("-", notation.minus)
    return text if standard_error is None or math.isnan(standard_error) else f"{text}{notation.plus_minus}{standard_error:.3f}"


def format_interval(row: dict, notation: Notation) -> str:
    """The confidence interval of a difference; a dash for a single conversation."""
    if math.isnan(row["low"]):
        return "–"
    return f"[{row['low']:.3f}, {row['high']:.3f}]".replace("-", notation.minus)


def layout(table: pandas.DataFrame, notation: Notation) -> pandas.DataFrame:
    """The table as text, a row for each system.

    Args:
        table: see :func:`read_answers`.
        notation: marks of the format.
    """
    interval = f"{100 * CONFIDENCE:.0f}{notation.percent} interval"
    rows = {
        row["label"]: {
            "loss before": format_loss(row["mean_nll_before"], row["standard_error_before"], notation),
            "loss after": format_loss(row["mean_nll_after"], row["standard_error_after"], notation),
            "difference": format_loss(row["difference"], None, notation),
            interval: format_interval(row, notation),
            "perplexity before": format_perplexity(row["perplexity_before"]),
            "perplexity after": format_perplexity(row["perplexity_after"]),
            "conversations": f"{row['num_conversations']:,}",
            "answer tokens": f"{row['num_tokens']:,}",
        }
        for row in table.to_dict("records")
    }
    return pandas.DataFrame(rows.values(), index=pandas.Index(rows, name="system"))


def caption_of(table: pandas.DataFrame, notation: Notation) -> str:
    """The sentences below the table."""
    marks = {"plus_minus": notation.plus_minus.strip(), "confidence": 100 * CONFIDENCE, "percent": notation.percent}
    return CAPTION.format(**marks, precisions=", ".join(table["precision"].unique()))


def render_answers(table: pandas.DataFrame, *, csv: str, markdown: str, latex: str) -> None:
    """Write the losses on held-out answers as CSV, Markdown and LaTeX (booktabs).

    Args:
        table: see :func:`read_answers`.
        csv, markdown, latex: files to write.
    """
    table.to_csv(csv, index=False)
    shown = layout(table, MARKDOWN)
    parts = ["# Loss on held-out answers", markdown_table(shown), caption_of(table, MARKDOWN)]
    Path(markdown).write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    shown = layout(table, LATEX).rename(index=escape_latex).replace({">1000": "$>$1000"})
    text = shown.reset_index().to_latex(
        index=False,
        escape=False,
        caption=caption_of(table, LATEX),
        label="tab:answers",
        column_format="l" + "r" * shown.shape[1],
    )
    Path(latex).write_text(text, encoding="utf-8")


# --- sample answers --------------------------------------------------------------------------------------------------------


def write_samples(table: pandas.DataFrame, records: list[str], outputs: list[str]) -> None:
    """Write the sample answers of each system as Markdown, with its losses above them.

    Args:
        table: see :func:`read_answers`.
        records: JSON files of the systems, in the order of the table.
        outputs: files to write, in the same order.
    """
    for row, record, output in zip(table.to_dict("records"), records, outputs, strict=True):
        samples = json.loads(Path(record).read_text(encoding="utf-8"))["samples"]
        Path(output).write_text(render_samples(row, samples), encoding="utf-8")


def render_samples(row: dict, samples: list[dict]) -> str:
    """Losses, questions, references and answers as Markdown, with long questions shortened.

    Args:
        row: of the table, see :func:`read_answers`.
        samples: source, messages, reference and answer of each.
    """
    before = format_loss(row["mean_nll_before"], row["standard_error_before"], MARKDOWN)
    after = format_loss(row["mean_nll_after"], row["standard_error_after"], MARKDOWN)
    parts = [
        f"# Answers of {row['label']}",
        f"The loss on the answers of {row['num_conversations']:,} conversations that were held out of the fine-tuning "
        f"({row['num_tokens']:,} tokens) is {before} nats per token before it and {after} after it: a difference of "
        f"{format_loss(row['difference'], None, MARKDOWN)}, 95 % interval {format_interval(row, MARKDOWN)}.",
        f"Below are greedy answers to the first {len(samples)} of these conversations.",
    ]
    for number, sample in enumerate(samples, start=1):
        question = shorten_middle(sample["messages"][-1]["content"])
        texts = {"Question": question, "Reference": sample["reference"], "Answer": sample["answer"] or "(nothing)"}
        parts.append(f"## {number}. {sample['source']}")
        parts += [f"**{name}**\n\n{indent(text)}" for name, text in texts.items()]
    return "\n\n".join(parts) + "\n"


def shorten_middle(text: str) -> str:
    """A text, without its middle if it is longer than :data:`SHOWN_CHARACTERS`."""
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters …]\n{text[-half:]}"


def indent(text: str) -> str:
    """A text as an indented Markdown code block, so that markup in it is not interpreted."""
    return "\n".join(f"    {line}" for line in text.splitlines())
