"""A figure laid out in points: texts and cells at their own places, over a scale of colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from depthmix.figures.style import INK, STYLE
from depthmix.figures.typeface import Points, Typeface

Place = tuple[Points, Points]
"""A place or a size: from the left and from the top, or width and height."""

MARGIN = 10
"""Room around everything, points."""

FOOT = 36
"""Height of the scale of colours with its numbers and name, points."""

BAR = (220, 7)
"""Width and height of the scale itself, points."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A part of a sheet, measured in points from its upper left corner."""

    axes: Axes
    """Axes that show nothing by themselves."""

    typeface: Typeface
    """Fonts of its texts."""

    def write(
        self,
        text: str,
        place: Place,
        *,
        size: Points = 7,
        colour: str = INK,
        room: Points | None = None,
        is_right: bool = False,
    ) -> None:
        """Write a text as it is, `$` and all, from a point or up to it, vertically around it.

        Args:
            text: A line of text that the typeface can write.
            place: Points from the left and from the top.
            size: Size of the letters, points.
            colour: Colour of the letters; by default the page's.
            room: Width beyond which the text is cut, points.
            is_right: Whether the text ends at the place, rather than begins there.
        """
        self.axes.text(
            *place,
            text if room is None else self.typeface.fit(text, size, room),
            color=colour,
            fontproperties=self.typeface.properties(size),
            ha="right" if is_right else "left",
            va="center_baseline",
            parse_math=False,
        )

    def fill(self, corner: Place, size: Place, colour: Sequence[float] | str) -> None:
        """Fill a rectangle, given by its upper left corner."""
        self.axes.add_patch(Rectangle(corner, *size, facecolor=colour, linewidth=0))

    def frame(self, corner: Place, size: Place, colour: str) -> None:
        """Draw the outline of a rectangle."""
        self.axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=0.8))


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A figure of panels over a scale of colours."""

    figure: Figure
    """What is drawn."""

    scale: ScalarMappable
    """The colour of each value."""

    typeface: Typeface
    """Fonts of its texts."""

    def add_panel(self, left: Points, top: Points, width: Points, height: Points) -> Panel:
        """Add a panel, by its place and size in points; texts may stand outside of it."""
        axes = self._add_axes(left, top, width, height)
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.set_axis_off()
        return Panel(axes=axes, typeface=self.typeface)

    def add_bar(self, name: str, *, left: Points) -> None:
        """Draw the scale of colours at the foot, and say what it is."""
        height = 72 * self.figure.get_size_inches()[1] - 2 * MARGIN
        with rc_context({**STYLE, "axes.grid": False}):
            axes = self._add_axes(left, height - FOOT + 8, *BAR)
            bar = self.figure.colorbar(self.scale, cax=axes, orientation="horizontal")
            bar.outline.set_visible(False)
            bar.ax.minorticks_off()
            bar.ax.tick_params(labelsize=7.5)
            bar.ax.set_xlabel(name, loc="left", fontsize=8)

    def _add_axes(self, left: Points, top: Points, width: Points, height: Points) -> Axes:
        full_width, full_height = (72 * inches for inches in self.figure.get_size_inches())
        corner = (MARGIN + left) / full_width, 1 - (MARGIN + top + height) / full_height
        with rc_context(STYLE):
            return self.figure.add_axes((*corner, width / full_width, height / full_height))


def make_sheet(
    width: Points, height: Points, *, scale: ScalarMappable, typeface: Typeface
) -> Sheet:
    """Make a sheet for panels of a size in points, with room for the scale below them."""
    size = (max(width, BAR[0] + 60) + 2 * MARGIN, height + FOOT + 2 * MARGIN)
    with rc_context(STYLE):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72))
    return Sheet(figure=figure, scale=scale, typeface=typeface)
