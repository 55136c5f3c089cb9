"""How numbers and texts are written in Markdown and in LaTeX."""

import re
from dataclasses import dataclass

import pandas


@dataclass(frozen=True)
class Notation:
    """The marks of a table in one format.

    Attributes:
        bold: format string of a bold number.
        plus_minus: sign before the standard error.
        minus: sign of a negative number.
        beyond: mark of a cell beyond the model's context.
        warning: mark of a low perplexity with a poor retrieval accuracy.
        percent: percent sign.
    """

    bold: str
    plus_minus: str
    minus: str
    beyond: str
    warning: str
    percent: str


MARKDOWN = Notation(bold="**{}**", plus_minus=" ± ", minus="−", beyond="†", warning=" ⚠", percent=" %")
LATEX = Notation(
    bold=r"\textbf{{{}}}",
    plus_minus=r" $\pm$ ",
    minus="$-$",
    beyond=r"\textsuperscript{\textdagger}",
    warning=r" (!)",
    percent=r"\,\%",
)


def format_perplexity(value: float) -> str:
    """Two decimals; ``>1000`` for larger values, as in the LongQLoRA paper; a dash for a missing one."""
    if pandas.isna(value):
        return "–"
    return ">1000" if value > 1000 else f"{value:.2f}"


def markdown_table(table: pandas.DataFrame) -> str:
    """A table of texts, the index to the left and all else to the right; a vertical bar in a name does not end its cell."""
    escaped = table.rename(index=lambda name: str(name).replace("|", r"\|"))
    return escaped.to_markdown(colalign=["left"] + ["right"] * table.shape[1], disable_numparse=True)


def markdown_list(items: list[str]) -> str:
    """A bulleted list."""
    return "\n".join(f"- {item}" for item in items)


def escape_latex(text: str) -> str:
    """A text with the special characters of LaTeX escaped."""
    escaped = re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", r"\textbackslash "))
    return escaped.replace("~", r"\textasciitilde ").replace("^", r"\textasciicircum ").replace(">", "$>$")
