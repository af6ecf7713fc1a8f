"""Which items are solved by which methods: Venn diagrams, or UpSet plots for many methods."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator

from depthmix.figures.style import GREY, INK, PALETTE, STYLE
from depthmix.figures.venn_layout import LEAST_ROOM, lay_out, visible_point
from depthmix.statistics.overlaps import Overlap

MOST_SETS = 24
"""Columns of an UpSet plot; smaller sets are not drawn, and it says so."""

LINE = 12
"""Points that a further line of a label takes."""


def draw_overlaps(
    overlaps: Mapping[str, Sequence[Overlap]],
    *,
    methods: Sequence[str] | None = None,
    columns: int = 3,
) -> Figure:
    """Draw which items each set of methods solves and the others do not.

    Two or three methods make Venn diagrams, with areas to scale where circles allow it (`lay_out`)
    and a note where they do not. One method or more than three make UpSet plots: a bar per set,
    over dots for its methods.

    Args:
        overlaps: Title of each diagram to its sets, as `count_overlaps` counts them.
        methods: Names of all methods, in order. `None` takes those that solve anything in any of
            the diagrams; name them where one may solve nothing, since no set holds it.
        columns: Venn diagrams beside each other.

    Returns:
        One diagram per title, with every count and the number of items that none solves.

    Raises:
        ValueError: If there is no diagram or one without items, no method, a method that `methods`
            lacks, or `columns` is not positive.
    """
    if not overlaps or not all(overlaps.values()) or columns < 1:
        sizes = {title: len(sets) for title, sets in overlaps.items()}
        raise ValueError(
            "`overlaps` and `columns` must be at least one, and each diagram must have items, got "
            f"{sizes} sets in {columns} columns; leave out what was not measured."
        )
    groups = [overlap.methods for sets in overlaps.values() for overlap in sets]
    # The largest sets come first, for they name most methods in their own order.
    solvers = list(dict.fromkeys(m for group in sorted(groups, key=len)[::-1] for m in group))
    methods = solvers if methods is None else list(methods)
    if not methods or not set(solvers) <= set(methods):
        raise ValueError(
            "`methods` must name what was compared, at least every method that solves an item "
            f"({', '.join(solvers) or 'none does'}), got {', '.join(methods) or 'no name'}; give "
            "the labels of the comparison."
        )
    with rc_context({**STYLE, "axes.grid.axis": "y"}):
        if len(methods) in (2, 3):
            return _draw_venns(overlaps, methods, min(columns, len(overlaps)))
        return _draw_upsets(overlaps, methods)


def _describe(sets: Sequence[Overlap]) -> str:
    """Say how many items there are, and how many of them no method solves."""
    num_items = sum(overlap.num_items for overlap in sets)
    num_unsolved = sum(overlap.num_items for overlap in sets if not overlap.methods)
    return f"{num_items:,} items, none solves {num_unsolved:,}"


def _label(method: str, sets: Sequence[Overlap]) -> str:
    """Name a method, and how many items it solves."""
    return f"{method} ({sum(s.num_items for s in sets if method in s.methods):,})"


def _draw_venns(
    overlaps: Mapping[str, Sequence[Overlap]], methods: Sequence[str], columns: int
) -> Figure:
    """Draw one Venn diagram per title."""
    num_rows = math.ceil(len(overlaps) / columns)
    written = [
        [textwrap.fill(_label(m, sets), 16, break_long_words=False) for m in methods]
        for sets in overlaps.values()
    ]
    above = LINE * max(label.count("\n") for labels in written for label in labels[:2])
    height = 3.2 + above / 72  # labels of several lines reach into the title's room
    figure = Figure(figsize=(3 * columns, height * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, columns, squeeze=False).ravel()
    for axes, labels, (title, sets) in zip(panels, written, overlaps.items(), strict=False):
        counts = np.zeros(2 ** len(methods), dtype=int)
        for overlap in sets:
            region = sum(1 << methods.index(method) for method in overlap.methods)
            counts[region] += overlap.num_items
        to_scale = _draw_venn(axes, labels, counts)
        note = "areas to scale" if to_scale else "areas not to scale"
        axes.set_title(f"{title}\n{_describe(sets)}\n{note}", fontsize=10, pad=6 + above)
    for axes in panels[len(overlaps) :]:
        axes.remove()
    return figure


def _draw_venn(axes: Axes, labels: Sequence[str], counts: Int[np.ndarray, " regions"]) -> bool:
    """Draw two or three circles with their labels and counts; tell whether they are to scale."""
    layout = lay_out(counts)
    left, bottom = (layout.centres - layout.radii[:, None]).min(0)
    right, top = (layout.centres + layout.radii[:, None]).max(0)
    goals = ((left - 0.2, top + 0.1), (right + 0.2, top + 0.1), ((left + right) / 2, bottom - 0.1))
    for number, (label, goal) in enumerate(zip(labels, goals, strict=False)):
        circle, color = (layout.centres[number], layout.radii[number]), PALETTE[number]
        line = ("-", "--", ":")[number]
        axes.add_patch(Circle(*circle, facecolor=color, alpha=0.3, linewidth=0))
        axes.add_patch(Circle(*circle, fill=False, edgecolor=color, linestyle=line, linewidth=1.8))
        axes.annotate(
            label,
            visible_point(layout, number, goal),
            xytext=goal,
            ha=("left", "right", "center")[number],
            va=("bottom", "bottom", "top")[number],
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": color, "shrinkA": 1, "shrinkB": 0},
        )
    for (x, y), count, room in zip(layout.middles[1:], counts[1:], layout.room[1:], strict=True):
        if room >= LEAST_ROOM:
            axes.text(x, y, f"{count:,}", ha="center", va="center", fontsize=10)
    axes.set_aspect("equal")
    below = 0.35 if len(labels) == 3 else 0.05
    axes.set(xlim=(left - 0.25, right + 0.25), ylim=(bottom - below, top + 0.3))
    axes.set_axis_off()
    return layout.to_scale


def _draw_upsets(overlaps: Mapping[str, Sequence[Overlap]], methods: Sequence[str]) -> Figure:
    """Draw one UpSet plot per title."""
    widest = max(min(len(sets), MOST_SETS + 1) for sets in overlaps.values())
    width = 1.8 + 0.09 * max(map(len, methods)) + 0.36 * max(widest, 6)
    height = 2.6 + 0.26 * len(methods)
    figure = Figure(figsize=(width, height * len(overlaps)), layout="constrained")
    ratios = [1.6, 0.26 * len(methods)] * len(overlaps)
    panels = figure.subplots(len(ratios), height_ratios=ratios)
    for bars, dots, title in zip(panels[::2], panels[1::2], overlaps, strict=True):
        _draw_upset(bars, dots, title, methods, overlaps[title])
        for axes in (bars, dots):
            axes.set_xlim(-0.6, widest - 0.4)  # bars are equally wide in all plots
            axes.set_xticks([])
    return figure


def _draw_upset(
    bars: Axes, dots: Axes, title: str, methods: Sequence[str], sets: Sequence[Overlap]
) -> None:
    """Draw the largest sets as bars over dots, and at the end the items that none solves."""
    solved = sorted((s for s in sets if s.methods), key=lambda s: -s.num_items)
    shown, hidden = solved[:MOST_SETS], solved[MOST_SETS:]
    heights = [s.num_items for s in (*shown, *(s for s in sets if not s.methods))]
    drawn = bars.bar(range(len(heights)), heights, width=0.62, color=PALETTE[0])
    bars.bar_label(drawn, [f"{height:,}" for height in heights], padding=2, fontsize=9)
    note = _describe(sets)
    if hidden:
        rest = sum(overlap.num_items for overlap in hidden)
        note += f"; not drawn: {len(hidden)} smaller sets with {rest:,} items"
    bars.set(title=f"{title}\n{note}", ylabel="items", ylim=(0, 1.12 * max(heights)))
    bars.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    x, y = np.meshgrid(range(len(shown)), range(len(methods)))
    dots.scatter(x, y, s=34, color=INK, alpha=0.14, linewidth=0)
    for column, overlap in enumerate(shown):
        rows = [methods.index(method) for method in overlap.methods]
        dots.plot([column] * len(rows), rows, "o-", color=PALETTE[0], markersize=5.8)
    for patch in drawn.patches[len(shown) :]:
        patch.set_color(GREY)
        middle = (len(methods) - 1) / 2
        dots.text(len(shown), middle, "none", rotation=90, ha="center", va="center", fontsize=9)
    dots.set_yticks(range(len(methods)), [_label(method, sets) for method in methods])
    dots.set_ylim(len(methods) - 0.5, -0.5)
    for side in ("left", "bottom"):
        dots.spines[side].set_visible(False)
    dots.grid(visible=False)
