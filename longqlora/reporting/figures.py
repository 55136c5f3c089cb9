"""Writing figures to files; the same drawing always gives the same SVG, byte for byte."""

from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as pyplot


@contextmanager
def panels_for(outputs: list[str], size: tuple[float, float], columns: int = 1, rows: int = 1) -> Iterator:
    """A grid of axes to draw on, row by row; on leaving, the figure is written to each of the outputs.

    Args:
        outputs: image files to write, in the format of their suffix.
        size: width and height of the figure, in inches.
        columns, rows: size of the grid.
    """
    with pyplot.rc_context({"svg.hashsalt": "longqlora", "font.size": 10}):  # the salt makes the SVG reproducible
        figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        yield axes.ravel()
        for path in outputs:
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.endswith(".svg") else None)
        pyplot.close(figure)
