"""Markdown as HTML, for readers that show no Markdown, such as the report of Snakemake."""

from html import escape
from pathlib import Path

from markdown_it import MarkdownIt

RENDERER = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["image", "link", "autolink", "reference"])
"""Labels and texts of documents are in the Markdown: no markup of theirs may load, link or run anything."""
STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5em; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3em 0.8em; border-bottom: 1px solid #8886; white-space: nowrap; }
"""


def html_of(markdown: str) -> str:
    """A table or caption of this package as HTML; HTML, links and images in it are shown as text."""
    return RENDERER.render(markdown)


def write_html(path: str, markdown: str) -> None:
    """Write a page of HTML that needs no other file.

    Args:
        path: file to write.
        markdown: Markdown file that it shows.
    """
    source = Path(markdown)
    Path(path).write_text(
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{escape(source.stem)}</title>\n'
        f"<style>{STYLE}</style>\n{html_of(source.read_text(encoding='utf-8'))}</html>\n",
        encoding="utf-8",
    )
