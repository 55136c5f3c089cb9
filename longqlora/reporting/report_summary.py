"""What an experiment asked and what came out, in three sentences and a few figures."""

import math
from collections.abc import Iterable

import pandas
from markupsafe import Markup, escape

from longqlora.reporting.comparisons import comparable, price_at_short_lengths, statistically_best
from longqlora.reporting.notation import MARKDOWN, format_perplexity
from longqlora.reporting.report_sources import Sources
from longqlora.reporting.tables import format_cell, format_price


def summarize(sources: Sources) -> dict | None:
    """What was asked and what came out, in three sentences."""
    if sources.find("tables/perplexity.csv") is None:
        return None
    cells = sources.frame("tables/perplexity.csv")
    cells = cells[cells["system"].notna()]  # the others are from the literature
    pairs = sources.frame("tables/differences.csv").query("tokens == 'all'")
    best = best_rows(cells, sources.base)
    similar = statistically_best(cells, pairs)
    prices = price_at_short_lengths(cells, pairs, sources.base)
    sentences = [asked(sources, cells), found(best, cells, similar, sources.base), paid(best, prices)]
    return {"sentences": [sentence for sentence in sentences if sentence], "facts": facts(best, prices)}


def best_rows(cells: pandas.DataFrame, base: str | None) -> list[dict]:
    """The cell with the lowest perplexity at the longest length on each evaluation set; the base only if it is the only row."""
    longest = comparable(cells[cells["eval_length"] == cells["eval_length"].max()])
    others = longest[longest["label"] != base]
    by_set = (longest if others.empty else others).groupby("dataset_label", sort=False)
    return [min(rows.to_dict("records"), key=lambda cell: cell["perplexity"]) for _, rows in by_set]


def asked(sources: Sources, cells: pandas.DataFrame) -> Markup:
    """What the experiment compares, on what."""
    systems = [sources.experiment["systems"][name] for name in sources.experiment["rows"]]
    targets = sorted({system["target_context"] for system in systems if system["target_context"]})
    trained = sum(bool(system["training"] or system["weights_of"]) for system in systems)
    base, sets = named(sources.experiment["base_model"]), listing(cells["dataset_label"].unique())
    own = cells.loc[cells["model"] == sources.experiment["base_model"], "model_context"].dropna()
    context = f"its context of {tokens(own.iloc[0])} tokens" if len(own) else "its context"
    if not targets:
        question = Markup("How well does {} read texts of up to {} tokens?").format(base, tokens(cells["eval_length"].max()))
    elif trained:
        question = Markup("Can {} be extended from {} to {}?").format(base, context, listing(map(tokens, targets)))
    else:
        question = Markup("How far beyond {} does {} reach without training?").format(context, base)
    number = f"{trained} trained and {len(systems) - trained} untrained" if trained else len(systems)
    models = "model was" if len(systems) == 1 else "models were"
    return Markup("{} To find out, {} {} measured on {}.").format(question, number, models, sets)


def found(best: list[dict], cells: pandas.DataFrame, similar: set, base: str | None) -> Markup:
    """The best row of each evaluation set at the longest length, with the base's perplexity there."""
    parts = []
    for cell in best:
        place = (cell["dataset_label"], cell["eval_length"])
        value = unbroken(format_cell(cell | {"is_within_context": None}, MARKDOWN, is_best=False))
        part = Markup("{} has the lowest perplexity on {}: {}").format(named(cell["label"]), place[0], value)
        at_place = cells[(cells["dataset_label"] == place[0]) & (cells["eval_length"] == place[1])]
        reference = at_place.loc[at_place["label"] == base, "perplexity"]
        if len(reference) and cell["label"] != base:
            part += f", where the base model has {format_perplexity(reference.iloc[0])}"
        ties = [label for label, *where in similar if tuple(where) == place and label != cell["label"]]
        if ties:
            others = named(ties[0]) if len(ties) == 1 else f"{len(ties)} other rows"
            part += Markup(" ({} {} not significantly different)").format(others, "is" if len(ties) == 1 else "are")
        parts.append(part)
    return Markup("At {} tokens, {}.").format(tokens(best[0]["eval_length"]), Markup("; ").join(parts))


def paid(best: list[dict], prices: pandas.DataFrame) -> Markup | None:
    """How the best rows differ from the base where it needs no extension."""
    of_best = [(cell["label"], cell["dataset_label"]) for cell in best]
    found = [price for price in prices.to_dict("records") if (price["label"], price["dataset_label"]) in of_best]
    if not found:
        return None
    changes = [
        Markup("{} for {} on {}").format(unbroken(format_price(price, MARKDOWN)), named(price["label"]), price["dataset_label"])
        for price in found
    ]
    length = tokens(found[0]["eval_length"])
    return Markup("At {} tokens, where the base model needs no extension, the perplexity changes by {}.").format(
        length, listing(changes)
    )


def facts(best: list[dict], prices: pandas.DataFrame) -> list[dict]:
    """The figures of the best row on the first evaluation set, each with its name."""
    cell = best[0]
    length = tokens(cell["eval_length"])
    shown = [
        ("longest context measured", length, "tokens"),
        (f"best perplexity at {length}", format_perplexity(cell["perplexity"]), cell["label"]),
    ]
    accuracy = cell.get("retrieval_accuracy")
    if accuracy is not None and not math.isnan(accuracy):
        shown.append((f"retrieval at {length}", f"{100 * accuracy:.0f} %", cell["label"]))
    for price in prices.to_dict("records"):
        if (price["label"], price["dataset_label"]) == (cell["label"], cell["dataset_label"]):
            shown.append(
                (f"change at {tokens(price['eval_length'])}", format_price(price, MARKDOWN), "compared with the base model")
            )
    return [{"name": name, "value": unbroken(value), "of": of} for name, value, of in shown]


def named(label: str) -> Markup:
    """A row or a model, set off from the sentence, because a name may have commas."""
    return Markup("<b>{}</b>").format(label)


def unbroken(value: str) -> str:
    """A number with its standard error and unit, which stay on one line."""
    return value.replace(" ", "\u00a0")


def tokens(number: float) -> str:
    """A number of tokens with separators."""
    return f"{number:,.0f}"


def listing(parts: Iterable[str]) -> Markup:
    """Parts of a sentence: ``a, b and c``; what is not markup is escaped."""
    *first, last = parts
    return Markup("{} and {}").format(Markup(", ").join(first), last) if first else escape(last)
