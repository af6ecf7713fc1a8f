"""Differences from a baseline with their intervals, one line each: a forest plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from depthmix.figures.style import INK, PALETTE, STYLE


@dataclass(frozen=True)
class Point:
    """One method's or setting's difference from the baseline."""

    label: str
    """Name of the method or setting."""

    mean: float
    """Mean score minus the baseline's, from -1 to 1."""

    low: float
    """Lower end of the difference's 95 % interval."""

    high: float
    """Upper end of the difference's 95 % interval."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Settings or methods against a baseline, on one task."""

    title: str
    """Heading, such as the name of the task."""

    xname: str
    """What differs between the points, such as `λ`."""

    points: tuple[Point, ...]
    """One per setting, the topmost first."""


def draw_sweeps(sweeps: Sequence[Sweep], *, baseline: str) -> Figure:
    """Draw differences in percentage points with their 95 % intervals, around zero.

    A dot marks a difference whose interval leaves out zero, a tick any other. The numbers stand
    beside them.

    Args:
        sweeps: Groups of differences, one under another.
        baseline: Name of what they are differences from.

    Returns:
        One panel per group, on one scale.

    Raises:
        ValueError: If there is no group, or a group without points.
    """
    if not sweeps or not all(sweep.points for sweep in sweeps):
        raise ValueError(
            "`sweeps` must be at least one, with at least one point in each, got "
            f"{[len(sweep.points) for sweep in sweeps]} points; leave out what was not measured."
        )
    heights = [len(sweep.points) for sweep in sweeps]
    with rc_context({**STYLE, "axes.spines.left": False}):
        size = (7.6, 0.9 + sum(0.42 + 0.25 * height for height in heights))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(sweeps), squeeze=False, sharex=True, height_ratios=heights)
        for axes, sweep in zip(panels.ravel(), sweeps, strict=True):
            _draw_points(axes, sweep)
        panels[-1, 0].set_xlabel(
            f"difference from {baseline}, percentage points\n"
            "with 95 % intervals; a dot where they leave out zero"
        )
    return figure


_MARKER = {"markersize": 7, "markeredgewidth": 1.8}


def _draw_points(axes: Axes, sweep: Sweep) -> None:
    """Draw one group."""
    rows = np.arange(len(sweep.points))
    means, low, high = 100 * np.array([(p.mean, p.low, p.high) for p in sweep.points]).T
    axes.axvline(0, color=INK, linewidth=0.9)
    errors = np.clip([means - low, high - means], 0, None)
    axes.errorbar(means, rows, xerr=errors, fmt="none", ecolor=PALETTE[0], elinewidth=1.6)
    certain = (low > 0) | (high < 0)
    for marker, shown in (("o", certain), ("|", ~certain)):
        axes.plot(means[shown], rows[shown], marker, color=PALETTE[0], **_MARKER)
    for row, numbers in enumerate(zip(means, low, high, strict=True)):
        mean, left, right = map(_points, numbers)
        axes.text(
            1.02,
            row,
            f"{mean} ({left} to {right})",
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=9.5,
        )
    axes.set_yticks(rows, [point.label for point in sweep.points])
    axes.set(title=sweep.title, ylim=(len(rows) - 0.4, -0.6))
    axes.annotate(
        sweep.xname,
        (0, 1),
        xytext=(-8, 5),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="right",
        fontsize=9.5,
        fontstyle="italic",
    )
    axes.grid(visible=False, axis="y")


def _points(value: float) -> str:
    """Write a difference in percentage points, with its sign and a true minus."""
    text = f"{value:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")  # noqa: RUF001
