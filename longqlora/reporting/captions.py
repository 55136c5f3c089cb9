"""Captions of the perplexity tables: what the numbers are, and what the marks mean that occur in the table."""

import pandas

from longqlora.evaluation.statistics import CONFIDENCE
from longqlora.reporting.comparisons import LOW_PERPLEXITY, POOR_RETRIEVAL, low_perplexity_poor_retrieval
from longqlora.reporting.notation import LATEX, Notation, escape_latex, format_perplexity
from longqlora.reporting.records import chat_sentences

PROTOCOLS = {
    "exact": "every token of a document but its first is scored once, in windows inside the document",
    "longqlora": "protocol of LongQLoRA, consecutive windows and the mean over windows",
    "longlora": "protocol of LongLoRA, a window every {stride} tokens and the mean over windows",
}


def caption_of(
    cells: pandas.DataFrame,
    retrieval: pandas.DataFrame,
    prices: pandas.DataFrame,
    gains: pandas.DataFrame,
    choices: list[tuple[list[str], dict]],
    notation: Notation,
) -> list[str]:
    """What is said below a table, one statement after the other: a list in Markdown, a paragraph in LaTeX.

    Args:
        cells: records of perplexity, see :func:`longqlora.reporting.records.read_records`.
        retrieval: records of retrieval; may be empty.
        prices: see :func:`longqlora.reporting.comparisons.price_at_short_lengths`; may be empty.
        gains: see :func:`longqlora.reporting.comparisons.gains_from_training`; may be empty.
        choices: labels of rows with ``rope_scaling: best``, and the record of their choice; may be empty.
        notation: marks of the format.
    """
    plain = escape_latex if notation is LATEX else str
    sentences = describe_gains(gains, notation) + describe_numbers(cells, notation)
    sentences += describe_retrieval(cells, retrieval, notation) + describe_choices(choices, notation)
    sentences += [plain(sentence) for sentence in (*chat_sentences(retrieval), *describe_longppl(cells))]
    for base, length in prices[["base", "eval_length"]].drop_duplicates().itertuples(index=False):
        sentences.append(
            f"Change at {length}: how much the perplexity differs from that of {plain(base)}, at the longest measured length "
            f"within its context; {notation.plus_minus.strip()} is the standard error of the paired difference."
        )
    others = cells.loc[cells["has_own_tokenizer"].astype(bool), "label"].unique()
    if len(others):
        named = plain(", ".join(others))
        sentences.append(f"Perplexity per token of its own tokenizer, not comparable with the other rows: {named}.")
        if "longppl" in cells:
            sentences[-1] += " They have no LongPPL, because the key tokens are of the base model's tokenizer."
    return sentences + [f"Warning: {plain(warning)}" for warning in cells["dataset_warning"].dropna().unique()]


def describe_numbers(cells: pandas.DataFrame, notation: Notation) -> list[str]:
    """Sentences about the perplexities and their marks."""
    protocol, stride = cells["protocol"].iloc[0], cells["stride"].iloc[0]  # with longlora the stride is the same in all cells
    precisions = ", ".join(cells["precision"].unique())
    units = ", ".join(sorted(cells["standard_error_units"].unique()))
    overlaps = protocol == "exact" and (cells["stride"] < cells["window"]).any()
    strides = f" Stride {', '.join(map(str, cells['stride'].unique()))}." if overlaps else ""
    sentences = [
        f"Perplexity by context length: {PROTOCOLS[protocol].format(stride=stride)}.{strides} Weights: {precisions}.",
        f"{notation.plus_minus.strip()} is the standard error over {units}.",
        f"{notation.bold.format('Bold')}: the best system of a column, and those that are not significantly different from it "
        f"(0 lies in the {100 * CONFIDENCE:.0f}{notation.percent} confidence interval of the paired difference).",
    ]
    if "seeds_deviation" in cells:
        counts = cells.loc[cells["seeds"] > 1, ["label", "seeds"]].drop_duplicates()
        named = "; ".join(f"{row.label}: {row.seeds}" for row in counts.itertuples())
        sentences.append(
            f"Trained by several seeds ({escape_latex(named) if notation is LATEX else named}): the perplexity of the mean "
            "loss over the seeds; in parentheses, its standard deviation over the seeds."
        )
    if not cells["is_within_context"].all():
        sentences.append(f"{notation.beyond} beyond the model's context.")
    return sentences


def describe_retrieval(cells: pandas.DataFrame, retrieval: pandas.DataFrame, notation: Notation) -> list[str]:
    """Sentences about the retrieval accuracies and their mark."""
    if retrieval.empty:
        return []
    tasks = sorted({part["task"] for cell in retrieval["cells"] for part in cell})
    sentences = [f"Retrieval: accuracy, the mean over depths and tasks ({', '.join(tasks).replace('_', ' ')})."]
    if low_perplexity_poor_retrieval(cells, retrieval):
        sentences.append(
            f"{notation.warning.strip()} low perplexity (at most {LOW_PERPLEXITY:g} times the best of the column), but a "
            f"retrieval accuracy below {100 * POOR_RETRIEVAL:.0f}{notation.percent}."
        )
    return sentences


def describe_gains(gains: pandas.DataFrame, notation: Notation) -> list[str]:
    """Sentences about what training added over the best row that is extended without it."""
    plain, sentences = escape_latex if notation is LATEX else str, []
    for gain in gains.to_dict("records"):
        percents = [f"{100 * value:.1f}" for value in (abs(gain["change"]), gain["standard_error"])]
        change = notation.plus_minus.join(percents) + notation.percent
        trained = f"{plain(gain['trained'])}: {format_perplexity(gain['trained_perplexity'])}"
        untrained = f"{plain(gain['untrained'])}: {format_perplexity(gain['untrained_perplexity'])}"
        if gain["significant"]:
            found = f"is {change} {'lower' if gain['change'] < 0 else 'higher'} than"
        else:
            sign = "+" if gain["change"] >= 0 else notation.minus
            found = f"is not significantly different ({sign}{change}) from"
        sentences.append(
            f"What training added at {gain['eval_length']} tokens on {plain(gain['dataset_label'])}: of the rows extended to "
            f"{gain['target_context']} tokens, the perplexity of the best trained one ({trained}) {found} that of the best "
            f"untrained one ({untrained})."
        )
    return sentences


def describe_choices(choices: list[tuple[list[str], dict]], notation: Notation) -> list[str]:
    """Sentences about the scalings that were chosen for rows with ``rope_scaling: best``."""
    plain, sentences = escape_latex if notation is LATEX else str, []
    for labels, choice in choices:
        losses = sorted((loss["mean_nll"], scaling) for scaling, loss in choice["scalings"].items())
        measured = ", ".join(f"{scaling} {loss:.2f}" for loss, scaling in losses)
        sentences.append(
            f"RoPE scaling of {plain('; '.join(labels))}: {choice['chosen']}, which has the lowest loss before training, on "
            f"{choice['tokens']} tokens of the training data in precision {choice['precision']} ({measured})."
        )
    return sentences


def describe_longppl(cells: pandas.DataFrame) -> list[str]:
    """Sentences about LongPPL: on which tokens it is measured, and who chose them."""
    if "longppl" not in cells:
        return []
    cells = cells[cells["num_key_tokens"].notna() & (cells["eval_length"] == cells["eval_length"].max())]
    evaluator, length = cells[["evaluator_label", "eval_length"]].iloc[0]
    counts = cells.drop_duplicates("dataset_label")[["num_key_tokens", "num_scored", "dataset_label"]]
    named = ", ".join(f"{key:.0f} of {scored:.0f} in {dataset}" for key, scored, dataset in counts.itertuples(index=False))
    return [
        f"LongPPL at {length}: the perplexity of the tokens that a long context helps to predict ({named}), as chosen by "
        f"{evaluator}, which the choice favors."
    ]
