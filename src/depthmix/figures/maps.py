"""Accuracy against two settings at once, as a heat map with its numbers, or as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from depthmix.depth.colours import ink_on
from depthmix.figures.style import STYLE
from depthmix.files.markdown import escape

COLOURS = "cividis"
"""Made for all kinds of colour vision; its lightness grows evenly, so grey shows the same."""

Cells = tuple[tuple[float | None, ...], ...]
"""Rows of numbers, `None` where there is no cell."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Accuracy for every pair of two settings, such as k and Top-K."""

    title: str
    """Heading, such as the name of the task."""

    row_name: str
    """Setting that differs from row to row; empty for a single row without one."""

    column_name: str
    """Setting that differs from column to column."""

    rows: tuple[str | int, ...]
    """Value of the setting of each row, the topmost first."""

    columns: tuple[str | int, ...]
    """Value of the setting of each column."""

    values: Cells
    """Accuracy from 0 to 1, per row and column; `None` where the settings exclude each other."""

    low: Cells
    """Lower end of each accuracy's 95 % interval."""

    high: Cells
    """Upper end of each accuracy's 95 % interval."""

    num_items: int
    """Items that every cell was measured on."""

    def __post_init__(self) -> None:
        """Check that the three tables have a number in the same cells, and in at least one."""
        shape = [len(self.columns)] * len(self.rows)
        tables = (self.values, self.low, self.high)
        filled = [[[cell is not None for cell in row] for row in table] for table in tables]
        if [len(row) for row in self.values] != shape or filled.count(filled[0]) != len(tables):
            raise ValueError(
                f"`values`, `low` and `high` of {self.title!r} must each have {len(self.rows)} "
                f"rows of {len(self.columns)} cells, filled at the same places, and have not; put "
                "`None` where there is no cell."
            )
        if not any(map(any, filled[0])):
            raise ValueError(
                f"`values` of {self.title!r} must have at least one cell, got none; leave the grid "
                "out."
            )


def draw_grid(grids: Sequence[Grid], *, columns: int = 2) -> Figure:
    """Draw heat maps of accuracy, with every value and half of its interval written in its cell.

    Args:
        grids: What to draw, row by row.
        columns: Grids beside each other.

    Returns:
        The heat maps, on one scale of colours from the lowest to the highest accuracy of all.

    Raises:
        ValueError: If there is no grid, or `columns` is not positive.
    """
    if not grids or columns < 1:
        raise ValueError(
            f"`grids` and `columns` must be at least one, got {len(grids)} grids in {columns} "
            "columns; leave out the figure of what was not measured."
        )
    columns = min(columns, len(grids))
    widths = [max(len(grid.columns) for grid in grids[n::columns]) for n in range(columns)]
    starts = range(0, len(grids), columns)
    heights = [max(len(grid.rows) for grid in grids[n : n + columns]) for n in starts]
    values = [100 * v for grid in grids for row in grid.values for v in row if v is not None]
    centre, half = (min(values) + max(values)) / 2, max(np.ptp(values) / 2, 0.5)
    scale = ScalarMappable(Normalize(centre - half, centre + half), colormaps[COLOURS])
    with rc_context({**STYLE, "axes.grid": False, "axes.spines.bottom": False}):
        size = (1.6 + 0.7 * columns + 0.62 * sum(widths), sum(0.85 + 0.46 * h for h in heights))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(
            len(heights), columns, squeeze=False, width_ratios=widths, height_ratios=heights
        ).ravel()
        for axes, grid in zip(panels, grids, strict=False):
            _draw_cells(axes, grid, scale)
        for axes in panels[len(grids) :]:
            axes.remove()
        bar = figure.colorbar(scale, ax=panels[: len(grids)], aspect=30, fraction=0.05, pad=0.02)
        bar.set_label("accuracy, % (± half of its 95 % interval)")
        bar.outline.set_visible(False)
    return figure


def to_markdown(grid: Grid) -> str:
    """Write a grid as a Markdown table of accuracies in percent, ± half of their intervals."""
    names = f"{grid.row_name} ↓, {grid.column_name} →" if grid.row_name else grid.column_name
    header = [names, *map(str, grid.columns)]
    lines = [header, ["---", *["---:"] * len(grid.columns)]]
    for number, row in enumerate(grid.rows):
        cells = [_label(grid, number, column, " ") for column in range(len(grid.columns))]
        lines.append([str(row), *cells])
    lines = [line if line is lines[1] else [*map(escape, line)] for line in lines]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{escape(_heading(grid))}\n\n{table}\n"


def _heading(grid: Grid) -> str:
    """Name a grid, and say on how many items it was measured."""
    return f"{grid.title} (n = {grid.num_items:,})"


def _label(grid: Grid, row: int, column: int, between: str) -> str:
    """Write a cell's accuracy in percent and half of its interval; nothing for no cell."""
    value, low, high = (table[row][column] for table in (grid.values, grid.low, grid.high))
    if value is None or low is None or high is None:
        return ""
    return f"{100 * value:.1f}{between}± {50 * (high - low):.1f}"


def _draw_cells(axes: Axes, grid: Grid, scale: ScalarMappable) -> None:
    """Draw one grid: a rectangle and a text for each cell."""
    for row, column in np.ndindex(len(grid.rows), len(grid.columns)):
        value = grid.values[row][column]
        if value is None:
            continue
        colour = scale.to_rgba(100 * value)
        axes.add_patch(Rectangle((column - 0.485, row - 0.48), 0.97, 0.96, facecolor=colour))
        axes.text(
            column,
            row,
            _label(grid, row, column, "\n"),
            color=ink_on(colour),
            ha="center",
            va="center",
            fontsize=9,
            linespacing=1.1,
        )
    axes.set(
        title=_heading(grid),
        xlabel=grid.column_name,
        ylabel=grid.row_name,
        xlim=(-0.5, len(grid.columns) - 0.5),
        ylim=(len(grid.rows) - 0.5, -0.5),
    )
    axes.set_xticks(range(len(grid.columns)), map(str, grid.columns))
    axes.set_yticks(range(len(grid.rows)), map(str, grid.rows))
    axes.spines["left"].set_visible(False)
