"""The figures of the page about one run."""

from __future__ import annotations

from matplotlib.figure import Figure

from depthmix.figures.accuracies import WIDTH, draw_accuracies
from depthmix.figures.curves import draw_curves
from depthmix.figures.overlap_diagrams import draw_overlaps
from depthmix.pages.report import Report

SMOOTHED = 40
"""Logged steps from which on curves are shown with a moving average."""


NARROW = 3.5
"""Inches of a figure that fits a phone: panels stand one below the other."""


def draw_report(report: Report, *, narrow: bool = False) -> dict[str, Figure]:
    """Draw the figures of a report.

    Args:
        report: What to draw.
        narrow: Draw those whose size can be chosen for a narrow screen, and leave out the others.

    Returns:
        Figures by name, of what there is: `losses`, `routing` and `optimisation`, and for each
        verdict, by its number, `accuracies_0` and `overlaps_0`. A loss has neither.
    """
    figures = {}
    for name, panels in report.panels.items():
        longest = max(len(curve.steps) for panel in panels for curve in panel.curves)
        width = 1 if longest < SMOOTHED else longest // 10
        columns, inches = (1, NARROW) if narrow else (2, None)
        figures[name] = draw_curves(panels, moving_average=width, columns=columns, width=inches)
    for number, verdict in enumerate(report.verdicts):
        row = verdict.comparison.rows[-1]  # the average of several tasks, or the only task
        bars = {
            score.method: (score.mean, score.interval.low, score.interval.high)
            for score in row.scores
        }
        if not row.is_loss:
            inches = NARROW if narrow else WIDTH
            drawn = draw_accuracies(bars, highlighted=verdict.run, width=inches)
            figures[f"accuracies_{number}"] = drawn
        if narrow:
            continue  # circles are small as they are, and many sets need their room
        overlaps = {
            task.task: task.overlaps
            for task in verdict.comparison.tasks
            if any(overlap.methods for overlap in task.overlaps)  # not circles around nothing
        }
        if overlaps and len(verdict.methods) > 1:
            figures[f"overlaps_{number}"] = draw_overlaps(overlaps, methods=list(verdict.methods))
    return figures
