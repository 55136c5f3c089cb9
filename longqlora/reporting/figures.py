"""Figures on disk: the same drawing gives the same bytes of an SVG."""

from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as pyplot


@contextmanager
def panels_for(outputs: list[str], size: tuple[float, float], columns: int = 1, rows: int = 1) -> Iterator:
    """Axes in a grid to draw on, row by row, written to each path of ``outputs`` afterwards, the format by its suffix.

    Args:
        outputs: image files.
        size: width and height of the figure, in inches.
        columns, rows: of the grid.
    """
    with pyplot.rc_context({"svg.hashsalt": "longqlora", "font.size": 10}):  # the salt makes the SVG reproducible
        figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        yield axes.ravel()
        for path in outputs:
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.endswith(".svg") else None)
        pyplot.close(figure)
