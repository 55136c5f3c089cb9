"""The report of an experiment: one HTML file without scripts that loads nothing, for a browser and for paper."""

import re
from html import escape
from itertools import count
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from longqlora.jobs.progress import duration
from longqlora.reporting.html_tables import html_of
from longqlora.reporting.report_content import SECTIONS, collect
from longqlora.reporting.report_sources import Sources

COLORS = {"#ffffff": "var(--plot)", "#000000": "var(--plot-ink)", "#b0b0b0": "var(--plot-grid)"}
"""Of matplotlib's drawings: background, ink and grid, which follow the color scheme of the reader."""
DRAWING = re.compile(r'<svg [^>]*viewBox="0 0 ([\d.]+) ([\d.]+)"[^>]*>(.*)', re.DOTALL)
NOT_DRAWN = re.compile(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", re.DOTALL)
POINTS_PER_PIXEL = 0.75


def render_report(sources: Sources, output: str) -> None:
    """Write the report.

    Args:
        sources: what it is made from, see :func:`longqlora.reporting.report_content.collect`.
        output: HTML file to write.
    """
    environment = Environment(
        loader=PackageLoader("longqlora.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"markdown": render_markdown, "svg": numbered_svg(), "duration": duration, "gib": gibibytes}
    content = collect(sources)
    html = environment.get_template("report.html.jinja").render(
        name=sources.experiment["name"],
        titles={name: title for name, (title, _) in SECTIONS.items() if content[name]},
        content=content,
        gib=gibibytes,
        duration=duration,
        style=Markup(Path(__file__).with_name("report.css").read_text(encoding="utf-8")),
    )
    Path(output).write_text(html, encoding="utf-8")


def render_markdown(text: str) -> Markup:
    """A table or caption of this package as HTML; wide tables scroll in a box of their own."""
    return Markup(html_of(text).replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>"))


def gibibytes(number: float) -> str:
    """A number of bytes in GiB."""
    return f"{number / 2**30:.2f} GiB"


def numbered_svg():
    """A filter of the template that puts drawings into the page; each has ids of its own."""
    numbers = count()
    return lambda path, title: inline_svg(path.read_text(encoding="utf-8"), f"plot-{next(numbers)}-", title)


def inline_svg(svg: str, prefix: str, title: str) -> Markup:
    """A drawing of matplotlib as an element of a page.

    Args:
        svg: content of the file.
        prefix: begins the ids, so that they differ from those of other drawings.
        title: what the drawing shows, for readers who do not see it.
    """
    width, height, body = DRAWING.search(svg).groups()  # type: ignore[union-attr]
    body = NOT_DRAWN.sub("", body)
    body = re.sub(r'\bid="', f'id="{prefix}', body)
    body = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", body)
    for color, variable in COLORS.items():
        body = body.replace(f": {color}", f": {variable}")
    pixels = float(width) / POINTS_PER_PIXEL
    style = f"width: 100%; max-width: {pixels:.0f}px; min-width: {0.6 * pixels:.0f}px"
    start = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}" style="{style}">'
    return Markup(f'<figure class="plot"><div class="scroll">{start}{body}</div></figure>')
