"""Findings as figures, and the data that each figure draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure

from depthmix.comparison.scores import MethodScore, TaskComparison
from depthmix.figures.curves import Panel, draw_curves
from depthmix.figures.maps import Grid, draw_grid
from depthmix.figures.overlap_diagrams import draw_overlaps
from depthmix.figures.sweeps import Point, Sweep, draw_sweeps
from depthmix.figures.trade_offs import TradeOff, draw_trade_offs
from depthmix.figures.training_panels import curves_from_logs
from depthmix_replication.findings import Findings, Row, subject_title

QUANTITIES = {
    "layer_loss": "training loss, nats per token",
    "routing_weight": "mean routing weight",
    "routing_variance": "variance of the routing weight",
    "routing_sparsity": "share of routing weights below 1e-5",
}
"""Axis of each logged quantity."""


def draw(findings: Findings) -> Figure:
    """Draw what an experiment shows.

    Args:
        findings: Of any experiment.

    Returns:
        Curves over training, heat maps, diagrams of solved items, scores beside speeds, or
        differences from the baseline.
    """
    shows = findings.experiment.shows
    if shows == "curves":
        return draw_curves(
            list(make_panels(findings)), moving_average=findings.experiment.moving_average
        )
    if shows == "grid":
        return draw_grid([make_grid(findings, task) for task in findings.comparison.tasks])
    if shows == "overlaps":
        overlaps = {task.task: task.overlaps for task in findings.comparison.tasks}
        return draw_overlaps(overlaps, methods=[row.label for row in findings.rows])
    if shows == "speed":
        task = findings.comparison.rows[-1]
        return draw_trade_offs(make_trade_offs(findings, task), title=task.task, xlabel=task.metric)
    return draw_sweeps(list(make_sweeps(findings)), baseline=findings.rows[0].label)


def make_panels(findings: Findings) -> Iterator[Panel]:
    """Lay out the curves of each quantity, method and subject.

    Args:
        findings: Of an experiment with quantities.

    Yields:
        One panel for each.
    """
    for quantity in findings.experiment.quantities:
        for row in findings.rows:
            for subject, logs in row.logs.items():
                where = f", {subject_title(subject)}" if len(row.logs) > 1 else ""
                yield Panel(
                    title=f"{row.label}{where}",
                    curves=curves_from_logs(logs, f"{quantity}/layer_"),
                    ylabel=QUANTITIES[quantity],
                )


def make_grid(findings: Findings, task: TaskComparison) -> Grid:
    """Lay out one task's accuracies over the experiment's two axes.

    Args:
        findings: Of an experiment with two axes.
        task: One of its tasks.

    Returns:
        Accuracies with their intervals; points that were not run are left open.
    """
    first, second = (axis.name for axis in findings.experiment.axes)
    rows = _values(findings.rows, first)
    columns = _values(findings.rows, second)
    cells: dict[tuple[str, str], MethodScore] = {}
    for row, score in zip(findings.rows, task.scores, strict=True):
        cells[str(row.point[first]), str(row.point[second])] = score
    table = [[cells.get((a, b)) for b in columns] for a in rows]
    return Grid(
        title=task.task,
        row_name=first,
        column_name=second,
        rows=rows,
        columns=columns,
        values=tuple(tuple(None if s is None else s.mean for s in line) for line in table),
        low=tuple(tuple(None if s is None else s.interval.low for s in line) for line in table),
        high=tuple(tuple(None if s is None else s.interval.high for s in line) for line in table),
        num_items=task.num_items,
    )


def make_trade_offs(findings: Findings, task: TaskComparison) -> list[TradeOff]:
    """Lay out one task's scores beside the speed of generation.

    Args:
        findings: Of an experiment whose runs were timed.
        task: One of its tasks, or their average.

    Returns:
        One setting for each row that was timed.
    """
    return [
        TradeOff(
            label=row.label,
            score=score.mean,
            low=score.interval.low,
            high=score.interval.high,
            speedups=tuple(speed.speedup for speed in row.speeds),
        )
        for row, score in zip(findings.rows, task.scores, strict=True)
        if row.speeds
    ]


def make_sweeps(findings: Findings) -> Iterator[Sweep]:
    """Lay out each task's differences from the baseline.

    Args:
        findings: Of an experiment with at least two methods or points.

    Yields:
        One group for each task, and one for their average.
    """
    axes = ", ".join(axis.name for axis in findings.experiment.axes)
    for task in findings.comparison.rows:
        points = tuple(
            Point(
                score.method,
                score.difference.estimate,
                score.difference.interval.low,
                score.difference.interval.high,
            )
            for score in task.scores
            if score.difference is not None
        )
        yield Sweep(title=task.task, xname=axes or "method", points=points)


def _values(rows: Sequence[Row], axis: str) -> tuple[str, ...]:
    """List the values on an axis as text, each once."""
    return tuple(dict.fromkeys(str(row.point[axis]) for row in rows))
