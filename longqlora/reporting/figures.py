"""Writing figures to files; the same drawing always gives the same SVG, byte for byte."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as pyplot
from matplotlib.colors import to_rgb
from matplotlib.rcsetup import cycler

STRONG = ["#3f90da", "#e76300", "#832db6", "#bd1f01", "#2f9e8f", "#a96b59", "#c98b00", "#d45fa8"]
"""Different for all kinds of color vision, on white and on black; most are from Petroff 2021, arXiv:2107.02270."""


def mixed(color: str, other: str) -> tuple[float, ...]:
    """A color halfway to another one."""
    return tuple((one + two) / 2 for one, two in zip(to_rgb(color), to_rgb(other), strict=True))


COLORS = [to_rgb(color) for color in STRONG] + [mixed(color, other) for other in ("white", "black") for color in STRONG]
GRAY = to_rgb("#8b8e92")  # of figures from the literature
STYLE: dict[Any, Any] = {"svg.hashsalt": "longqlora", "font.size": 10, "axes.prop_cycle": cycler(color=COLORS)}
"""The salt makes the SVG reproducible."""


@contextmanager
def panels_for(outputs: list[str], size: tuple[float, float], columns: int = 1, rows: int = 1) -> Iterator:
    """A grid of axes to draw on, row by row; on leaving, the figure is written to each of the outputs.

    Args:
        outputs: image files to write, in the format of their suffix.
        size: width and height of the figure, in inches.
        columns, rows: size of the grid.
    """
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        yield axes.ravel()
        for path in outputs:
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.endswith(".svg") else None)
        pyplot.close(figure)
