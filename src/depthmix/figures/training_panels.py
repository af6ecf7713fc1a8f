"""What training logged, as panels of curves: losses, routing, optimisation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from depthmix.figures.curves import Curve, Panel

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


def curves_from_logs(logs: Sequence[Sequence[Mapping[str, Any]]], prefix: str) -> tuple[Curve, ...]:
    """Collect what the trainers of several seeds logged for each late layer.

    Args:
        logs: For each seed, its trainer's `log_history`.
        prefix: Beginning of the names, before the number of the layer, such as
            `routing_weight/layer_`.

    Returns:
        One curve per layer, in increasing order, at the steps that all seeds logged. Where a seed
        stopped early or logged at other steps, `num_left_out` counts the steps that are missing.

    Raises:
        ValueError: If there is nothing with this prefix, or seeds have different layers or no step
            in common.
    """
    layers = [
        {int(name.removeprefix(prefix)) for entry in log for name in entry if _is_of(name, prefix)}
        for log in logs
    ]
    if not layers or not layers[0] or any(found != layers[0] for found in layers):
        raise ValueError(
            f"`logs` must have entries `{prefix}i` for the same late layers i in every seed, got "
            f"{[sorted(found) for found in layers]}; pass the logs of runs of one method."
        )
    return tuple(
        curve_from_logs(logs, f"{prefix}{layer}", label=f"layer {layer}")
        for layer in sorted(layers[0])
    )


def curve_from_logs(logs: Sequence[Sequence[Mapping[str, Any]]], name: str, *, label: str) -> Curve:
    """Collect what the trainers of several seeds logged under one name.

    Args:
        logs: For each seed, its trainer's `log_history`.
        name: The name, such as `grad_norm`.
        label: What the legend calls it.

    Returns:
        The curve at the steps that all seeds logged; `num_left_out` counts the others.

    Raises:
        ValueError: If there is no step at which all seeds logged it.
    """
    # A run that was resumed logs the steps after its checkpoint again: the last one counts.
    seeds = [{entry["step"]: entry[name] for entry in log if name in entry} for log in logs]
    steps = sorted(set.intersection(*map(set, seeds))) if seeds else []
    if not steps:
        raise ValueError(
            f"`logs` must have steps at which all seeds logged `{name}`, got none; log all "
            "seeds with the same `logging_steps`."
        )
    return Curve(
        label=label,
        steps=tuple(steps),
        values=tuple(tuple(float(seed[step]) for step in steps) for seed in seeds),
        num_left_out=len(set.union(*map(set, seeds))) - len(steps),
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


def _is_of(name: str, prefix: str) -> bool:
    """Tell whether a name is the prefix and the number of a layer."""
    return name.startswith(prefix) and name.removeprefix(prefix).isdecimal()
