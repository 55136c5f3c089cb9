"""Figures on disk: the same drawing gives the same bytes of an SVG."""

from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as pyplot


@contextmanager
def panels_for(outputs: list[str], size: tuple[float, float], panels: int = 1) -> Iterator:
    """Axes side by side to draw on, written to each path of ``outputs`` afterwards, the format by its suffix.

    Args:
        outputs: image files.
        size: width and height of the figure, in inches.
        panels: how many axes.
    """
    with pyplot.rc_context({"svg.hashsalt": "longqlora", "font.size": 10}):  # the salt makes the SVG reproducible
        figure, axes = pyplot.subplots(1, panels, figsize=size, squeeze=False, layout="constrained")
        yield axes[0]
        for path in outputs:
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.endswith(".svg") else None)
        pyplot.close(figure)
