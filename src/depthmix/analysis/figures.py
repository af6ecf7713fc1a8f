"""Figures of a run, from its log; each function takes plain data and returns a figure.

Text and axes take the colour of the page (`to_svg`), so that one figure suits light and dark.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from io import StringIO
from typing import Any

import numpy as np
from cycler import cycler
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

ROUTING_WEIGHT = "routing_weight/layer_"
PALETTE = ("#2f81c7", "#d9730d", "#12926a", "#c2609a", "#8a7a1f", "#7a6bd0")
"""Okabe and Ito's colours, darkened or lightened until they read on white and on black."""

INK = "#123456"
"""Stands for the colour of the page's text; `to_svg` replaces it by `currentColor`."""

STYLE = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.prop_cycle": cycler(linestyle=["-", "--", ":"]) * cycler(color=PALETTE),
    "axes.unicode_minus": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "legend.fontsize": 9.5,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "svg.fonttype": "none",  # text stays text: searchable, and in the page's font
    "svg.hashsalt": "depthmix",
}


def training_loss(log_history: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the training loss, and beside it the distillation loss where there is one.

    Args:
        log_history: The trainer's log; entries without a loss are skipped.

    Returns:
        One panel in nats per token, or two.
    """
    task = "task_loss" if any("task_loss" in entry for entry in log_history) else "loss"
    panels = {"Task loss": task}
    if any("distillation_loss" in entry for entry in log_history):
        panels["Distillation loss"] = "distillation_loss"
    with _style():
        figure = Figure(figsize=(7.6, 2.9), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for panel, (title, key), color in zip(axes, panels.items(), PALETTE, strict=False):
            steps, values = _series(log_history, key)
            _draw_trend(panel, steps, values, color)
            panel.set(title=title, ylabel="nats", ylim=(0, 1.08 * max(values.max(), 0.1)))
            _label_steps(panel)
    return figure


def routing_weights(log_history: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw how much each late layer counts over training, and how evenly they share.

    Args:
        log_history: The trainer's log, with `routing_weight/layer_{i}` and `routing_entropy`.

    Returns:
        Mean weight per late layer, and the routing entropy in nats up to its largest value ln k.

    Raises:
        ValueError: If the log has no routing weights.
    """
    layers = routed_layers(log_history)
    if not layers:
        raise ValueError(
            f"`log_history` must have entries with `{ROUTING_WEIGHT}i`, which only the mixture "
            "logs, got none; draw `training_loss` instead."
        )
    with _style():
        figure = Figure(figsize=(7.6, 2.9), layout="constrained")
        weights, entropy = figure.subplots(1, 2, width_ratios=(1.7, 1))
        for layer in layers:
            steps, values = _series(log_history, f"{ROUTING_WEIGHT}{layer}")
            weights.plot(steps, values, label=f"layer {layer}", **_markers(steps))
        weights.set(title="Routing weight", ylabel="mean weight", ylim=(-0.02, 1.02))
        figure.legend(loc="outside lower left", ncols=min(6, len(layers)), handlelength=1.6)
        steps, values = _series(log_history, "routing_entropy")
        entropy.plot(steps, values, color=PALETTE[-1], **_markers(steps))
        limit = float(np.log(len(layers)))
        if limit > 0:
            entropy.axhline(limit, color=INK, linewidth=0.8, linestyle=":")
            label = f"even: ln {len(layers)}"
            entropy.text(1, limit, label, transform=entropy.get_yaxis_transform(), **_ABOVE_RIGHT)
        entropy.set(title="Routing entropy", ylabel="nats", ylim=(0, 1.18 * max(limit, 0.1)))
        for panel in (weights, entropy):
            _label_steps(panel)
    return figure


def accuracies(rows: Mapping[str, tuple[float, float, float]]) -> Figure:
    """Draw accuracies with their 95 % intervals, one row each.

    Args:
        rows: Name to accuracy, low and high end, each between 0 and 1; the first is on top.

    Returns:
        Horizontal bars on a scale from 0 to 100 %.
    """
    with _style():
        figure = Figure(figsize=(7.6, 0.6 + 0.42 * len(rows)), layout="constrained")
        panel = figure.subplots()
        values, low, high = np.array(list(rows.values())).T
        color = ["#8c939e", *PALETTE][: len(rows)]
        panel.barh(list(rows), values, height=0.62, color=color, alpha=0.85)
        errors = np.clip([values - low, high - values], 0, None)
        panel.errorbar(
            values, list(rows), xerr=errors, fmt="none", ecolor=INK, elinewidth=1.2, capsize=3
        )
        for row, (value, end) in enumerate(zip(values, high, strict=True)):
            panel.annotate(
                f"{100 * value:.0f} %", (end, row), xytext=(7, 0), va="center", **_POINTS
            )
        panel.invert_yaxis()
        panel.set(xlim=(0, 1), xlabel="accuracy, with its 95 % interval")
        panel.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        panel.grid(visible=False, axis="y")
        panel.spines["left"].set_visible(False)
    return figure


def routed_layers(log_history: Sequence[Mapping[str, Any]]) -> list[int]:
    """Name the late layers whose routing weights a log holds, in increasing order."""
    names = {name for entry in log_history for name in entry if name.startswith(ROUTING_WEIGHT)}
    return sorted(int(name.removeprefix(ROUTING_WEIGHT)) for name in names)


def to_svg(figure: Figure) -> str:
    """Write a figure as an `<svg>` element that can stand in a page.

    The same figure gives the same text. The element scales with the page and its text has the
    page's colour.
    """
    buffer = StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with _style():
        figure.savefig(buffer, format="svg", metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # Group names repeat in every figure, and the style sheet would reach the whole page.
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    return re.sub(r'(<svg [^>]*?)width="[^"]*"|height="[\d.]+pt"', r"\1", svg, count=2)


_POINTS = {"textcoords": "offset points", "fontsize": 10}
_ABOVE_RIGHT = {"ha": "right", "va": "bottom", "fontsize": 9}


def _style() -> AbstractContextManager[None]:
    """Apply the one style of all figures, and only inside."""
    return rc_context(STYLE)


def _series(
    log_history: Sequence[Mapping[str, Any]], key: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Collect the steps at which a value was logged, and the values."""
    points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values


def _draw_trend(
    axes: Axes, steps: NDArray[np.float64], values: NDArray[np.float64], color: str
) -> None:
    """Draw a noisy curve pale and its moving mean strong; a short curve only as it is."""
    width = len(values) // 8
    if width < 3:
        axes.plot(steps, values, color=color, **_markers(steps))
        return
    axes.plot(steps, values, color=color, alpha=0.3, linewidth=1)
    # Dividing by the number of points under the window keeps the ends unbiased.
    window = np.ones(width)
    mean = np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")
    axes.plot(steps, mean, color=color)


def _label_steps(axes: Axes) -> None:
    """Number the horizontal axis by whole steps."""
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def _markers(steps: NDArray[np.float64]) -> dict[str, Any]:
    """Mark the points of a curve that is too short to be seen as a line."""
    return {"marker": "o", "markersize": 4} if len(steps) <= 5 else {}
