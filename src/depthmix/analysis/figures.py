"""Figures of a run, from its log; each function takes plain data and returns a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from depthmix.analysis.curves import label_steps, markers, moving_mean
from depthmix.analysis.style import GREY, INK, PALETTE, STYLE

ROUTING_WEIGHT = "routing_weight/layer_"


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
    with rc_context(STYLE):
        figure = Figure(figsize=(7.6, 2.9), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for panel, (title, key), color in zip(axes, panels.items(), PALETTE, strict=False):
            steps, values = _series(log_history, key)
            _draw_trend(panel, steps, values, color)
            panel.set(title=title, ylabel="nats", ylim=(0, 1.08 * max(values.max(), 0.1)))
            label_steps(panel)
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
    with rc_context(STYLE):
        figure = Figure(figsize=(7.6, 2.9), layout="constrained")
        weights, entropy = figure.subplots(1, 2, width_ratios=(1.7, 1))
        for layer in layers:
            steps, values = _series(log_history, f"{ROUTING_WEIGHT}{layer}")
            weights.plot(steps, values, label=f"layer {layer}", **markers(len(steps)))
        weights.set(title="Routing weight", ylabel="mean weight", ylim=(-0.02, 1.02))
        figure.legend(loc="outside lower left", ncols=min(6, len(layers)), handlelength=1.6)
        steps, values = _series(log_history, "routing_entropy")
        entropy.plot(steps, values, color=PALETTE[-1], **markers(len(steps)))
        limit = float(np.log(len(layers)))
        if limit > 0:
            entropy.axhline(limit, color=INK, linewidth=0.8, linestyle=":")
            label = f"even: ln {len(layers)}"
            entropy.text(1, limit, label, transform=entropy.get_yaxis_transform(), **_ABOVE_RIGHT)
        entropy.set(title="Routing entropy", ylabel="nats", ylim=(0, 1.18 * max(limit, 0.1)))
        for panel in (weights, entropy):
            label_steps(panel)
    return figure


def accuracies(rows: Mapping[str, tuple[float, float, float]]) -> Figure:
    """Draw accuracies with their 95 % intervals, one row each.

    Args:
        rows: Name to accuracy, low and high end, each between 0 and 1; the first is on top.

    Returns:
        Horizontal bars on a scale from 0 to 100 %.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(7.6, 0.6 + 0.42 * len(rows)), layout="constrained")
        panel = figure.subplots()
        values, low, high = np.array(list(rows.values())).T
        color = [GREY, *PALETTE][: len(rows)]
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


_POINTS = {"textcoords": "offset points", "fontsize": 10}
_ABOVE_RIGHT = {"ha": "right", "va": "bottom", "fontsize": 9}


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
        axes.plot(steps, values, color=color, **markers(len(steps)))
        return
    axes.plot(steps, values, color=color, alpha=0.3, linewidth=1)
    axes.plot(steps, moving_mean(values, width), color=color)
