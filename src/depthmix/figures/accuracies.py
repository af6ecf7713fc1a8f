"""Accuracies with their intervals, as bars."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator, PercentFormatter

from depthmix.figures.style import GREY, INK, PALETTE, STYLE

LONGEST_LINE = 44
"""Characters of a name after which it goes on in the next line, so that bars keep their room."""

WIDTH = 7.6
"""Inches of a figure, where nothing else is said; a narrower one has shorter lines."""


def draw_accuracies(
    rows: Mapping[str, tuple[float, float, float]],
    *,
    highlighted: str | None = None,
    width: float = WIDTH,
) -> Figure:
    """Draw accuracies with their 95 % intervals, one row each.

    Args:
        rows: Name to accuracy, low and high end, each between 0 and 1; the first is on top.
        highlighted: Name of the row that the figure is about; the others are grey. `None` for none.
        width: Of the figure, in inches.

    Returns:
        Horizontal bars on a scale from 0 to 100 %.

    Raises:
        ValueError: If there is no row.
    """
    if not rows:
        raise ValueError("`rows` must have at least one accuracy, got none.")
    with rc_context(STYLE):
        longest = max(12, int(LONGEST_LINE * width / WIDTH) - (4 if width < WIDTH else 0))
        names = [textwrap.fill(name, longest) for name in rows]
        height = sum(0.22 + 0.2 * (1 + name.count("\n")) for name in names)
        figure = Figure(figsize=(width, 0.6 + height), layout="constrained")
        panel = figure.subplots()
        values, low, high = np.array(list(rows.values())).T
        color = [PALETTE[0] if name == highlighted else GREY for name in rows]
        places = np.arange(len(rows))
        panel.barh(places, values, height=0.62, color=color, alpha=0.85)
        panel.set_yticks(places, names)
        errors = np.clip([values - low, high - values], 0, None)
        panel.errorbar(
            values, places, xerr=errors, fmt="none", ecolor=INK, elinewidth=1.2, capsize=3
        )
        for row, (value, end) in enumerate(zip(values, high, strict=True)):
            panel.annotate(
                f"{100 * value:.1f} %",
                (end, row),
                xytext=(7, 0),
                textcoords="offset points",
                fontsize=10,
                va="center",
            )
        panel.invert_yaxis()
        panel.xaxis.set_major_locator(MultipleLocator(0.2 if width >= WIDTH else 0.5))
        panel.set(xlim=(0, 1), xlabel="accuracy, with its 95 % interval")
        panel.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        panel.grid(visible=False, axis="y")
        panel.spines["left"].set_visible(False)
    return figure
