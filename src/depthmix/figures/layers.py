"""A lens as a plain figure: what each layer guesses in place of each token."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle

from depthmix.depth.colours import RAMP, ink_on
from depthmix.depth.lens import Lens, Prediction
from depthmix.depth.token_texts import visible_text
from depthmix.figures.style import GREY, INK, STYLE
from depthmix.method.config import Readout

Shade = Literal["probability", "entropy", "rank", "kl"]
"""What colours a guess of a layer."""

NAMES: dict[Shade, str] = {
    "probability": "probability of the guess",
    "entropy": "entropy of the prediction, nats",
    "rank": "rank of the true token",
    "kl": "KL divergence to the final layer, nats",
}
"""What stands at the scale of colours."""

COLOURS = LinearSegmentedColormap.from_list("lens", RAMP)
"""The page's own."""

MOST_COLUMNS, MOST_BESIDE = 48, 24
"""Tokens beyond which a figure says nothing any more, and columns of two heat maps in one row."""

CELL_WIDTH, CELL_HEIGHT = 0.62, 0.2
"""Size of a cell, inches."""

MOST_SIGNS = 8
"""Letters that a cell has room for; signs of double width count twice."""


def draw_layers(
    lenses: Mapping[str, Lens],
    *,
    shade: Shade = "probability",
    tokens: tuple[int, int] | None = None,
) -> Figure:
    """Draw each layer's likeliest guess in place of each token, as a heat map.

    Guesses of the token that came are framed. A line under a guess of a late layer is as long as
    the layer's routing weight. The first token has no column, since nothing predicts it; after
    the last one stands what would come next.

    Args:
        lenses: One lens or two of the same text, by the name of the model.
        shade: What colours a cell: `probability` of the guess, `entropy` of the prediction, `rank`
            of the true token (on a logarithmic scale), or `kl` divergence to the final layer.
        tokens: First and last token to show, counted from 1; `None` shows all.

    Returns:
        A heat map per lens, the deepest layer on top, on one scale of colours; two stand beside
        each other, or below each other where they have more than 24 columns.

    Raises:
        ValueError: If the lenses are none, more than two or of different texts, or have no such
            tokens or more than 48.
    """
    texts, first, last = _choose(lenses, tokens)
    # Column i stands for token i, counted from 0, and the last one for what comes next.
    columns = range(max(first, 1), last + (last == len(texts)))
    predictions = {name: _list_rows(lens) for name, lens in lenses.items()}
    every = [prediction for rows in predictions.values() for prediction in rows.values()]
    labels = sorted({each.readout for each in every}, key=_height, reverse=True)
    known = [value for each in every for value in _measure(each, shade, columns)]
    scale = _make_scale(shade, [value for value in known if value is not None])
    guesses = [each.top_tokens[i - 1][0] for each in every for i in columns]
    families, unwritable = _find_fonts([*lenses, *texts[first:last], *guesses])
    across = len(lenses) if len(lenses) * len(columns) <= MOST_BESIDE else 1
    down = len(lenses) // across
    size = (
        across * (max(len(columns), 5) * CELL_WIDTH + 0.8),
        down * (len(labels) * CELL_HEIGHT + 0.6) + 0.9,
    )
    plain = {"axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}
    with rc_context({**STYLE, **plain, "font.family": families}):
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(down, across, squeeze=False).ravel()
        for axes, (name, rows) in zip(panels, predictions.items(), strict=True):
            _label(axes, name, texts, columns, labels, unwritable)
            for y, label in enumerate(labels):
                if label in rows:
                    _draw_row(axes, y, lenses[name], rows[label], shade, columns, scale, unwritable)
        bar = figure.colorbar(
            scale, ax=list(panels), location="bottom", shrink=0.5, aspect=40, anchor=(0.0, 0.0)
        )
        bar.outline.set_visible(False)
        bar.ax.minorticks_off()
        bar.ax.tick_params(labelsize=7.5)
        line = ", line: routing weight" if any(lens.routing for lens in lenses.values()) else ""
        bar.ax.set_xlabel(f"{NAMES[shade]} (framed: the token that came{line})", fontsize=8)
    return figure


def _choose(
    lenses: Mapping[str, Lens], tokens: tuple[int, int] | None
) -> tuple[tuple[str, ...], int, int]:
    """Find the text of all lenses, and which of its tokens are shown, counted from 0."""
    texts = {lens.tokens for lens in lenses.values()}
    if len(texts) != 1 or len(lenses) > 2:
        raise ValueError(
            f"`lenses` must be one or two of the same tokens, got {len(lenses)} with {len(texts)} "
            "different rows of tokens; draw a figure for each."
        )
    (text,) = texts
    first, last = (1, len(text)) if tokens is None else tokens
    if not 1 <= first <= last <= len(text) or last - first >= MOST_COLUMNS:
        raise ValueError(
            f"`tokens` must name a first and a last token of the text, which has {len(text):,}, "
            f"and at most {MOST_COLUMNS} in all, got {first:,} to {last:,}; draw a part of it, "
            f"such as 1 to {min(MOST_COLUMNS, len(text)):,}."
        )
    return text, first - 1, last


def _list_rows(lens: Lens) -> dict[Readout, Prediction]:
    """List a lens's rows; without a mixture the model's own prediction is its final layer's."""
    own = (lens.ensemble,) if lens.routing is not None else ()
    return {prediction.readout: prediction for prediction in (*lens.layers, *own)}


def _height(readout: Readout) -> float:
    """Order rows by depth, with the ensemble above all layers."""
    return math.inf if readout == "ensemble" else float(readout)


def _measure(prediction: Prediction, shade: Shade, columns: Sequence[int]) -> list[float | None]:
    """Measure one layer's prediction of tokens; `None` for the rank of what comes next."""
    measured: Sequence[float] = {
        "probability": [row[0] for row in prediction.top_probabilities],
        "entropy": prediction.entropy,
        "rank": prediction.rank,
        "kl": prediction.kl_to_final,
    }[shade]
    return [float(measured[i - 1]) if i <= len(measured) else None for i in columns]


def _make_scale(shade: Shade, values: Sequence[float]) -> ScalarMappable:
    """Give guesses one scale of colours."""
    if shade == "rank":
        return ScalarMappable(LogNorm(1, max([2, *values])), COLOURS)
    highest = 1 if shade == "probability" else max([1e-6, *values])
    return ScalarMappable(Normalize(0, highest), COLOURS)


def _find_fonts(texts: Iterable[str]) -> tuple[list[str], frozenset[str]]:
    """Find fonts of this machine that write texts, matplotlib's own first, and what none has."""
    missing = {sign for text in texts for sign in visible_text(text)}.union("…0123456789ABCDEFU+⟨⟩")
    entries = [
        entry
        for entry in fontManager.ttflist
        # The font of last resort has a box for each character.
        if (entry.style, entry.weight) == ("normal", 400) and "Last Resort" not in entry.name
    ]
    entries.sort(key=lambda one: (one.name != "DejaVu Sans", "Sans" not in one.name, one.name))
    families: list[str] = []
    for entry in entries:
        font = FT2Font(entry.fname)
        found = {sign for sign in missing if font.get_char_index(ord(sign))}
        if found:
            families.append(entry.name)
        missing -= found
        if not missing:
            break
    return families, frozenset(missing)


def _show(text: str, unwritable: frozenset[str], *, dots: bool = True) -> str:
    """Write a token as far as its cell has room."""
    whole = visible_text(text, dots=dots, unwritable=unwritable)
    widths = [1 + (unicodedata.east_asian_width(sign) in "WF") for sign in whole]
    if sum(widths) <= MOST_SIGNS:
        return whole
    kept = int(np.searchsorted(np.cumsum(widths), MOST_SIGNS - 1, side="right"))
    return f"{whole[:kept]}…"


def _label(
    axes: Axes,
    name: str,
    texts: Sequence[str],
    columns: range,
    labels: Sequence[Readout],
    unwritable: frozenset[str],
) -> None:
    """Write the model above a heat map, its tokens on top and its layers beside it."""
    axes.set_title(visible_text(name, dots=False, unwritable=unwritable), fontsize=10)
    axes.set(xlim=(0, len(columns)), ylim=(len(labels), 0))
    axes.set_ylabel("layer", fontsize=8)
    axes.xaxis.tick_top()
    tokens = [_show(texts[i], unwritable) if i < len(texts) else "next" for i in columns]
    axes.set_xticks(np.arange(len(columns)) + 0.5, tokens, fontsize=7)
    axes.set_yticks(np.arange(len(labels)) + 0.5, map(str, labels), fontsize=7)


def _draw_row(
    axes: Axes,
    y: int,
    lens: Lens,
    prediction: Prediction,
    shade: Shade,
    columns: range,
    scale: ScalarMappable,
    unwritable: frozenset[str],
) -> None:
    """Draw the guesses of one layer: a cell on its colour, a frame, a line, a text."""
    layer, routing = prediction.readout, lens.routing
    if layer != "ensemble" and prediction.jsd_to_ensemble is None:
        axes.get_yticklabels()[y].set_color(GREY)  # it does not vote
    for x, (i, value) in enumerate(zip(columns, _measure(prediction, shade, columns), strict=True)):
        guess, ink = prediction.top_tokens[i - 1][0], INK
        if value is not None:
            colour = scale.to_rgba(np.asarray(value))
            ink = ink_on(colour)
            axes.add_patch(Rectangle((x + 0.01, y + 0.03), 0.98, 0.94, facecolor=colour, lw=0))
        if i < len(lens.tokens) and guess == lens.tokens[i]:
            frame = Rectangle((x + 0.03, y + 0.09), 0.94, 0.82, fill=False, edgecolor=ink, lw=0.8)
            axes.add_patch(frame)
        if routing is not None and layer in routing.late_layers:
            weight = routing.weights[i - 1][routing.late_layers.index(layer)]
            line = Rectangle((x + 0.06, y + 0.78), 0.88 * weight, 0.07, facecolor=ink, lw=0)
            axes.add_patch(line)
        axes.text(x + 0.06, y + 0.5, _show(guess, unwritable), color=ink, size=6.5, va="center")
