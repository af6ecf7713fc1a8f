"""The one style of all figures, and how a figure becomes a file or part of a page.

Text and axes take the colour of the page, so that one figure suits light and dark. Curves and cells
differ in more than their hue, so that they can be told apart in grey.
"""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path

from cycler import cycler
from matplotlib import rc_context
from matplotlib.figure import Figure

from depthmix.files.drafts import drafting, write_whole

PALETTE = ("#2f81c7", "#d9730d", "#12926a", "#c2609a", "#8a7a1f", "#7a6bd0")
"""Okabe and Ito's colours, darkened or lightened until they read on white and on black."""

GREY = "#8c939e"
"""What is there for comparison only; reads on white and on black."""

INK = "#1f2328"
"""Colour of text and axes on white; in SVG, `currentColor` takes its place."""

DARK_INK = "#e6edf3"
"""Colour of text and axes of an SVG file on a dark page."""

SUFFIXES = (".svg", ".png", ".pdf")
"""What a figure can be written as."""

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
    "text.parse_math": False,  # labels are names, and a dollar in them is a dollar
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "pdf.fonttype": 42,  # the font itself: text can be searched and copied
    "svg.fonttype": "none",  # text stays text: searchable, and in the page's font
    "svg.hashsalt": "depthmix",
}


def to_svg(figure: Figure, *, name: str = "") -> str:
    """Write a figure as an `<svg>` element that can stand in a page.

    The same figure gives the same text. The element scales down with the page, and its text has
    the page's colour.

    Args:
        figure: What to write.
        name: Tells figures of one page apart, whose elements must not share an id.

    Returns:
        The element.
    """
    svg = _draw_svg(figure, name)
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*"|height="[\d.]+pt"', r"\1", svg, count=2)
    return svg.replace("<svg ", f'<svg style="max-width: {figure.get_figwidth():g}in" ', 1)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as SVG, PNG or PDF.

    Figures that are drawn from the same data give the same bytes. An SVG file has no background,
    and its text suits a light or a dark page, whichever the reader has chosen. PNG (200 dots per
    inch) and PDF are on white.

    Args:
        figure: What to write.
        path: The file to write, whose suffix is its format; its folder is made if missing.

    Returns:
        The written file.

    Raises:
        ValueError: If the suffix is none of `.svg`, `.png` and `.pdf`.
    """
    undated = {".svg": {}, ".png": {"Software": None}, ".pdf": {"CreationDate": None}}
    if path.suffix not in undated:
        raise ValueError(
            f"`path` must end in .svg, .png or .pdf, which gives the format, got {str(path)!r}; "
            "convert one of these to any other format."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".svg":
        dark = f"@media (prefers-color-scheme:dark){{svg{{color:{DARK_INK}}}}}"
        style = f"<style>svg{{color:{INK}}}{dark}</style>"
        return write_whole(path, _draw_svg(figure).replace(">", f">{style}", 1))
    kind, metadata = path.suffix[1:], undated[path.suffix]
    with rc_context(STYLE), drafting(path) as draft:
        figure.savefig(draft, format=kind, facecolor="white", dpi=200, metadata=metadata)
    return path


def _draw_svg(figure: Figure, name: str = "") -> str:
    """Write a figure as an `<svg>` element of its own size, in the page's colour and font."""
    buffer = StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context({**STYLE, "svg.hashsalt": f"depthmix{name}"}):
        figure.savefig(buffer, format="svg", metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # Group names repeat in every figure, and the style sheet would reach the whole page.
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    return re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
