"""Curves over training, one panel per quantity: means over seeds, and their range."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from depthmix.figures.style import PALETTE, STYLE

DASHES = ("-", "--", ":", "-.", (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (9, 2)))
"""Line styles, one per colour, so that curves can be told apart in grey."""

ONE_SEED = "one seed"
"""What a legend says of a single seed; without entries and anything else, it is left out."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One quantity over training, measured at the same steps in every seed."""

    label: str
    """Name of the curve in the legend."""

    steps: tuple[int, ...]
    """Optimiser steps at which it was measured."""

    values: tuple[tuple[float, ...], ...]
    """For each seed, one value per step."""

    num_left_out: int = 0
    """Steps at which some seeds were measured and others were not."""

    def __post_init__(self) -> None:
        """Check that every seed has a value at every step."""
        lengths = [len(row) for row in self.values]
        if not self.steps or set(lengths) != {len(self.steps)}:
            raise ValueError(
                f"`values` of the curve {self.label!r} must have a row per seed, with a number "
                f"for each of its steps, got rows of {lengths} numbers for {len(self.steps)} "
                "steps; keep the steps that all seeds have, as `curves_from_logs` does."
            )


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Curves that share their axes."""

    title: str
    """Heading of the panel."""

    curves: tuple[Curve, ...]
    """What it shows. A label has the same colour and line style in all panels of a figure; one that
    is the panel's title has no entry in the legend."""

    ylabel: str
    """Name of the quantity, with its unit."""

    ylim: tuple[float, float] | None = None
    """Ends of the vertical axis; `None` fits them to the curves."""


def draw_curves(
    panels: Sequence[Panel],
    *,
    xlabel: str = "optimizer step",
    moving_average: int = 1,
    columns: int = 2,
    width: float | None = None,
) -> Figure:
    """Draw each curve's mean over seeds as a line, and the range of the seeds as a band.

    A single seed has no band; under its moving average it is drawn as it is, pale.

    Args:
        panels: What to draw, row by row.
        xlabel: Name of the horizontal axis, with its unit.
        moving_average: Points over which each seed is averaged (`moving_mean`); 1 for none.
        columns: Panels beside each other.
        width: Of the figure, in inches; `None` takes what suits the columns.

    Returns:
        The panels over one legend, which says how many seeds there are and what was left out.

    Raises:
        ValueError: If there is nothing to draw, or `moving_average` or `columns` is not positive.
    """
    if not panels or not all(panel.curves for panel in panels):
        raise ValueError(
            "`panels` must be at least one, with at least one curve in each, got "
            f"{[len(panel.curves) for panel in panels]} curves; leave out what was not logged."
        )
    if moving_average < 1 or columns < 1:
        raise ValueError(
            "`moving_average` and `columns` must be at least 1, got "
            f"{moving_average} and {columns}; 1 is no average."
        )
    labels = list(dict.fromkeys(curve.label for panel in panels for curve in panel.curves))
    columns = min(columns, len(panels))
    num_rows = math.ceil(len(panels) / columns)
    width = width or (7.6 if columns > 1 else 4.8)
    with rc_context(STYLE):
        figure = Figure(figsize=(width, 0.6 + 2.5 * num_rows), layout="constrained")
        grid = figure.subplots(num_rows, columns, squeeze=False).ravel()
        lines: dict[str, Line2D] = {}
        titles = {panel.title for panel in panels}
        named = [label for label in labels if label not in titles]
        alone = {"color": PALETTE[-1 if named else 0], "linestyle": "-"}
        strokes = {label: _stroke(number) for number, label in enumerate(named)}
        strokes = {label: strokes.get(label, alone) for label in labels}
        for axes, panel in zip(grid, panels, strict=False):
            for curve in panel.curves:
                stroke = strokes[curve.label]
                lines[curve.label] = _draw_curve(axes, curve, moving_average, stroke)
            axes.set(title=panel.title, ylabel=panel.ylabel, ylim=panel.ylim)
            label_steps(axes, xlabel)
        for axes in grid[len(panels) :]:
            axes.remove()
        every = [curve for panel in panels for curve in panel.curves]
        words = _describe(every, moving_average)
        if named or words != ONE_SEED:
            entry = max(map(len, named), default=0) + 8  # characters, of which an inch holds 13
            figure.legend(
                [lines[label] for label in named],
                named,
                title=words,
                loc="outside lower left",
                alignment="left",
                title_fontsize=9,
                ncols=max(1, min(len(named), int(13 * width / entry))),
                handlelength=3,
            )
    return figure


def moving_mean(values: Float[np.ndarray, " steps"], width: int) -> Float[np.ndarray, " steps"]:
    """Average each value with its neighbours, `width` of them together.

    At the ends, the mean is over the neighbours that there are, which keeps it unbiased. With an
    even width, one more of them is taken from before than from after.
    """
    window = np.ones(width)
    sums = np.convolve(values, window)
    counts = np.convolve(np.ones_like(values), window)
    start = (width - 1) // 2
    return (sums / counts)[start : start + len(values)]


def label_steps(axes: Axes, xlabel: str = "optimizer step") -> None:
    """Name the horizontal axis and number it by whole steps."""
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def markers(num_steps: int) -> dict[str, Any]:
    """Mark the points of a curve that is too short to be seen as a line."""
    return {"marker": "o", "markersize": 4} if num_steps <= 5 else {}


def _stroke(number: int) -> dict[str, Any]:
    """Give the next curve a colour and a line style; 36 of them differ."""
    turn = number // len(PALETTE)
    return {
        "color": PALETTE[number % len(PALETTE)],
        "linestyle": DASHES[(number + turn) % len(DASHES)],
    }


def _draw_curve(axes: Axes, curve: Curve, moving_average: int, stroke: Mapping[str, Any]) -> Line2D:
    """Draw one curve and, with several seeds, their range; one seed is pale under its average."""
    seeds = np.array([moving_mean(np.array(row, float), moving_average) for row in curve.values])
    if len(seeds) > 1:
        axes.fill_between(
            curve.steps,
            seeds.min(axis=0),
            seeds.max(axis=0),
            color=stroke["color"],
            alpha=0.2,
            linewidth=0,
        )
    elif moving_average > 1:
        axes.plot(curve.steps, curve.values[0], color=stroke["color"], alpha=0.3, linewidth=1)
    (line,) = axes.plot(curve.steps, seeds.mean(axis=0), **stroke, **markers(len(curve.steps)))
    return line


def _describe(curves: Sequence[Curve], moving_average: int) -> str:
    """Say what line and band are, and which steps are missing."""
    fewest, most = (count(len(curve.values) for curve in curves) for count in (min, max))
    number = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    parts = [ONE_SEED if most == 1 else f"mean of {number} seeds and their range"]
    if moving_average > 1:
        parts.append(f"moving average of {moving_average} points")
    num_left_out = max(curve.num_left_out for curve in curves)
    if num_left_out:
        parts.append(f"steps left out because a seed lacks them: {num_left_out:,}")
    return ", ".join(parts)
