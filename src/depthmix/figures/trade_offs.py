"""What speed costs: scores of settings beside the speed that they bring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from depthmix.figures.style import INK, PALETTE, STYLE


@dataclass(frozen=True, kw_only=True)
class TradeOff:
    """One setting: how well, and how fast."""

    label: str
    """Name of the setting."""

    score: float
    """Mean score, from 0 to 1."""

    low: float
    """Lower end of the score's 95 % interval."""

    high: float
    """Upper end of the score's 95 % interval."""

    speedups: tuple[float, ...]
    """Speed over the dense model's, for each training seed."""


def draw_trade_offs(trade_offs: Sequence[TradeOff], *, title: str, xlabel: str) -> Figure:
    """Draw scores with their 95 % intervals beside speeds with their range over seeds.

    Args:
        trade_offs: At least one setting, the topmost first, each with the speed of at least one
            seed.
        title: Heading, such as the name of the task.
        xlabel: What is scored.

    Returns:
        Two panels with one line for each setting.

    Raises:
        ValueError: If there is no setting, or one without a speed.
    """
    if not trade_offs or not all(one.speedups for one in trade_offs):
        raise ValueError(
            "`trade_offs` must be at least one, each with at least one speed, got "
            f"{[len(one.speedups) for one in trade_offs]} speeds; leave out what was not timed."
        )
    scores = np.array([(one.score, one.low, one.high) for one in trade_offs])
    speeds = np.array([(np.mean(s), min(s), max(s)) for s in (one.speedups for one in trade_offs)])
    with rc_context({**STYLE, "axes.spines.left": False}):
        size = (7.6, 1.2 + 0.3 * len(trade_offs))
        figure = Figure(figsize=size, layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _draw_lines(left, scores)
        _draw_lines(right, speeds)
        left.set(title=title, xlabel=f"{xlabel}, with its 95 % interval")
        left.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        right.set(title="speed over dense", xlabel="mean and range of the seeds")
        right.axvline(1, color=INK, linewidth=0.9)
        right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} x"))
        left.set_yticks(range(len(trade_offs)), [one.label for one in trade_offs])
        left.set_ylim(len(trade_offs) - 0.5, -0.5)
    return figure


def _draw_lines(axes: Axes, values: np.ndarray) -> None:
    """Draw each setting's mean with its lower and upper end."""
    rows = np.arange(len(values))
    means, low, high = values.T
    axes.hlines(rows, low, high, color=PALETTE[0], linewidth=1.6)
    axes.plot(means, rows, "o", color=PALETTE[0], markersize=6)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.grid(visible=False, axis="y")
