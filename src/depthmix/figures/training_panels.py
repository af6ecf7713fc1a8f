"""What training logged, as panels of curves: losses, routing, optimisation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from depthmix.figures.curves import Curve, Panel, curve_from_logs, curves_from_logs

LOSS = {
    "task_loss": "task loss",
    "loss": "task loss",
    "distillation_loss": "distillation loss",
    "eval_loss": "validation loss",
}
"""Names in the log, and what a panel is called. `loss` is that of a run without a mixture."""

OPTIMISATION = {
    "learning_rate": ("learning rate", "learning rate"),
    "grad_norm": ("gradient norm", "norm, before clipping"),
    "tokens_per_second": ("pace", "tokens per second"),
    "memory_gib": ("memory", "GiB"),
}
"""The same, with the unit."""

BY_LAYER = {
    "layer_loss/layer_": ("loss of each late layer", "nats per token"),
    "routing_weight/layer_": ("routing weight, mean over tokens", "weight"),
    "routing_variance/layer_": ("routing weight, variance over tokens", "weight squared"),
    "routing_sparsity/layer_": ("tokens that make no use of a layer", "share of tokens"),
}
"""Beginnings of names that end in a layer's number, with panel and unit."""

Logs = Sequence[Sequence[Mapping[str, Any]]]


def loss_panels(logs: Logs) -> tuple[Panel, ...]:
    """Make panels of the task, distillation and validation losses, and each late layer's own.

    Args:
        logs: For each seed, its trainer's `log_history`.

    Returns:
        Panels in nats, of what was logged (the paper's figure 1 for `layer_loss`).
    """
    names = list(LOSS)
    if _is_logged(logs, "task_loss"):
        names.remove("loss")  # which has the weighted distillation in it
    panels = [
        _panel(title, "nats per token", [curve_from_logs(logs, name, label=title)])
        for name in names
        if _is_logged(logs, name)
        for title in [LOSS[name]]
    ]
    return (*panels, *_panels_by_layer(logs, ["layer_loss/layer_"]))


def routing_panels(logs: Logs) -> tuple[Panel, ...]:
    """Make panels of the routing weights' mean, variance, sparsity and entropy.

    Args:
        logs: For each seed, its trainer's `log_history`.

    Returns:
        Panels over the label tokens of each step, one curve per late layer (the paper's figures 4
        and 7), and the entropy in nats up to ln k; nothing for a run without a mixture.
    """
    prefixes = [prefix for prefix in BY_LAYER if prefix.startswith("routing")]
    panels = _panels_by_layer(logs, prefixes)
    if not panels or not _is_logged(logs, "routing_entropy"):
        return panels
    limit = max(math.log(len(panels[0].curves)), 0.1)
    title = "routing entropy"
    entropy = curve_from_logs(logs, "routing_entropy", label=title)
    nats = f"nats, at most ln {len(panels[0].curves)}"
    return (
        *panels,
        Panel(title=title, curves=(entropy,), ylabel=nats, ylim=(-0.02 * limit, 1.04 * limit)),
    )


def optimisation_panels(logs: Logs) -> tuple[Panel, ...]:
    """Make panels of the learning rate, the gradients' norm, tokens per second and memory.

    Args:
        logs: For each seed, its trainer's `log_history`.

    Returns:
        Panels of what was logged.
    """
    return tuple(
        _panel(title, unit, [curve_from_logs(logs, name, label=title)])
        for name, (title, unit) in OPTIMISATION.items()
        if _is_logged(logs, name)
    )


def _panels_by_layer(logs: Logs, prefixes: Sequence[str]) -> tuple[Panel, ...]:
    """Make a panel for each beginning of names that was logged."""
    found = {name for log in logs for entry in log for name in entry}
    return tuple(
        _panel(title, unit, curves_from_logs(logs, prefix))
        for prefix in prefixes
        if any(name.startswith(prefix) for name in found)
        for title, unit in [BY_LAYER[prefix]]
    )


def _panel(title: str, unit: str, curves: Sequence[Curve]) -> Panel:
    """Make a panel from zero to a little above the highest point, or the whole range of shares."""
    values = [value for curve in curves for row in curve.values for value in row]
    # With loss scaling the gradient's norm is infinite where a step was skipped.
    highest = max(filter(math.isfinite, values), default=0.0)
    if "share" in unit or unit == "weight":
        ends = (-0.02, 1.02)
    else:
        ends = (0.0, 1.08 * highest if highest > 0 else 1.0)
    return Panel(title=title, curves=tuple(curves), ylabel=unit, ylim=ends)


def _is_logged(logs: Logs, name: str) -> bool:
    """Tell whether every seed logged something."""
    return all(any(name in entry for entry in log) for log in logs)
