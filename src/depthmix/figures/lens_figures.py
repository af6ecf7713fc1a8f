"""A lens as plain figures: the text token by token, and layers by tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure

from depthmix.depth.lens import Lens, Prediction
from depthmix.depth.readout import Readout
from depthmix.depth.token_texts import visible_text
from depthmix.figures.lens_measures import (
    NAMES,
    Quantity,
    Shade,
    measure_guesses,
    measure_tokens,
)
from depthmix.figures.sheet import Panel, Place, make_sheet
from depthmix.figures.style import GREY, INK, ink_on
from depthmix.figures.typeface import Points, Typeface, find_typeface

COLOURS = LinearSegmentedColormap.from_list(
    "lens", ["#fbfaf4", "#e6f0c8", "#b5dcbd", "#74c0be", "#3f9cbb", "#2a6dab", "#213f88"]
)
"""The page's own: darker step by step, so that grey says the same, and pale behind most texts."""

MOST_TOKENS, MOST_COLUMNS = 1000, 48
"""Tokens of a text, and of a heat map, beyond which a figure says nothing any more."""

WIDEST = 1200
"""Width up to which two heat maps stand beside each other, points."""

NARROWEST = 400
"""Width that the legend needs, points."""

CELL_WIDTH, CELL_HEIGHT, LINE = 46, 14, 19
"""Size of a cell in a heat map and height of a line of text, points."""

EDGE, HEAD = 48, 36
"""Room beside a heat map for layers, and above it for its title and tokens, points."""

SIZE = 10
"""Size of the letters of titles and of a text, points; in heat maps they are smaller."""


@dataclass(frozen=True, kw_only=True)
class _Word:
    """Where a token of the text stands, points; `lead` is the width of its first spaces."""

    text: str
    line: int
    left: float
    width: float
    lead: float


def draw_tokens(
    lenses: Mapping[str, Lens],
    *,
    quantity: Quantity = "loss",
    tokens: tuple[int, int] | None = None,
    width: float | int = 7,
) -> Figure:
    """Draw a text with each token on the colour of how the model itself predicted it.

    A token's colour tells of the prediction of it, after the token before; the first one has none.

    Args:
        lenses: One lens or two of the same text, by the name of the model.
        quantity: `loss` and `entropy` of the ensemble, mean Jensen-Shannon divergence (`jsd`) of
            late layers from it, `mean_depth` `Σ G_i i`, or entropy of the routing weights
            (`routing_entropy`).
        tokens: First and last token to show, counted from 1; `None` shows all.
        width: Width of a line, inches.

    Returns:
        The text in as many lines as it takes, once per lens, on one scale of colours: from the
        lowest value for the mean depth, from zero for all else.

    Raises:
        ValueError: If the lenses are none, more than two or of different texts, lack the quantity,
            or have no such tokens or more than 1,000.
    """
    texts, first, last = _choose(lenses, tokens, MOST_TOKENS)
    values = {
        name: measure_tokens(name, lens, quantity)[first:last] for name, lens in lenses.items()
    }
    known = [value for row in values.values() for value in row if value is not None]
    low = min(known, default=0.0) if quantity == "mean_depth" else 0.0
    scale = ScalarMappable(Normalize(low, max([low + 1e-6, *known])), COLOURS)
    typeface = _find_typeface([*texts[first:last], *lenses])
    words = _wrap(texts[first:last], typeface, 72 * width)
    height = LINE * (words[-1].line + 1)
    step = height + 28
    sheet = make_sheet(72 * width, len(lenses) * step - 8, scale=scale, typeface=typeface)
    for number, (name, row) in enumerate(values.items()):
        panel = sheet.add_panel(0, number * step + 18, 72 * width, height)
        panel.write(typeface.show(name, dots=False), (0, -9), size=SIZE, room=72 * width)
        for word, value in zip(words, row, strict=True):
            _draw_token(panel, word, _find_colour(scale, value))
    sheet.add_bar(NAMES[quantity], left=0)
    return sheet.figure


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
        each other, or below each other where that would be wider than 17 inches.

    Raises:
        ValueError: If the lenses are none, more than two or of different texts, or have no such
            tokens or more than 48.
    """
    texts, first, last = _choose(lenses, tokens, MOST_COLUMNS)
    # Column i stands for token i, counted from 0, and the last one for what comes next.
    columns = range(max(first, 1), last + (last == len(texts)))
    rows = {name: _label_rows(lens) for name, lens in lenses.items()}
    labels = sorted({label for row in rows.values() for label in row}, key=_height, reverse=True)
    every = [prediction for row in rows.values() for prediction in row.values()]
    values = [value for each in every for value in measure_guesses(each, shade, columns)]
    scale = _make_scale(shade, [value for value in values if value is not None])
    guesses = {each.top_tokens[i - 1][0] for each in every for i in columns}
    typeface = _find_typeface([*texts[first:last], *lenses, *guesses])
    width, height = CELL_WIDTH * len(columns), CELL_HEIGHT * len(labels)
    is_beside = len(lenses) * (EDGE + width) <= WIDEST
    right, down = (EDGE + width, 0) if is_beside else (0, HEAD + height)
    extra = len(lenses) - 1
    full_size = (max(EDGE + width + extra * right, NARROWEST), HEAD + height + extra * down)
    sheet = make_sheet(*full_size, scale=scale, typeface=typeface)
    for number, (name, row) in enumerate(rows.items()):
        panel = sheet.add_panel(EDGE + number * right, HEAD + number * down, width, height)
        panel.write(typeface.show(name, dots=False), (0, -25), size=SIZE, room=width)
        _write_tokens(panel, texts, columns)
        for y, prediction in ((y, row[label]) for y, label in enumerate(labels) if label in row):
            colours = measure_guesses(prediction, shade, columns)
            _write_layer(panel, prediction, y)
            for x, (i, value) in enumerate(zip(columns, colours, strict=True)):
                corner = (x * CELL_WIDTH, y * CELL_HEIGHT)
                colour = _find_colour(scale, value)
                guess = prediction.top_tokens[i - 1][0]
                is_right = i < len(texts) and guess == texts[i]
                weight = _find_weight(lenses[name], prediction.readout, i)
                _draw_guess(panel, corner, guess, colour, is_right=is_right, weight=weight)
    line = ", line: routing weight" if any(lens.routing for lens in lenses.values()) else ""
    sheet.add_bar(f"{NAMES[shade]} (framed: the token that came{line})", left=EDGE)
    return sheet.figure


def _choose(
    lenses: Mapping[str, Lens], tokens: tuple[int, int] | None, most: int
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
    if not 1 <= first <= last <= len(text) or last - first >= most:
        raise ValueError(
            f"`tokens` must name a first and a last token of the text, which has {len(text):,}, "
            f"and at most {most:,} in all, got {first:,} to {last:,}; draw a part of it, such as "
            f"1 to {min(most, len(text)):,}."
        )
    return text, first - 1, last


def _label_rows(lens: Lens) -> dict[Readout, Prediction]:
    """Find a lens's rows; without a mixture the model's own prediction is its final layer's."""
    own = (lens.ensemble,) if lens.routing is not None else ()
    return {prediction.readout: prediction for prediction in (*lens.layers, *own)}


def _height(readout: Readout) -> float:
    """Order rows by depth, with the ensemble above all layers."""
    return math.inf if readout == "ensemble" else float(readout)


def _find_weight(lens: Lens, readout: Readout, i: int) -> float | None:
    """Find a layer's routing weight in the prediction of token i; `None` where it has none."""
    if lens.routing is None or readout not in lens.routing.late_layers:
        return None
    return lens.routing.weights[i - 1][lens.routing.late_layers.index(readout)]


def _make_scale(shade: Shade, values: Sequence[float]) -> ScalarMappable:
    """Give guesses one scale of colours."""
    if shade == "rank":
        return ScalarMappable(LogNorm(1, max([2, *values])), COLOURS)
    highest = 1 if shade == "probability" else max([1e-6, *values])
    return ScalarMappable(Normalize(0, highest), COLOURS)


def _find_colour(scale: ScalarMappable, value: float | None) -> tuple[float, ...] | None:
    """Find a value's colour; what was not measured has none."""
    return None if value is None else tuple(map(float, scale.to_rgba(np.asarray(value))))


def _find_typeface(texts: Iterable[str]) -> Typeface:
    """Find fonts for texts as they are shown."""
    return find_typeface(visible_text(text) for text in texts)


def _wrap(texts: Sequence[str], typeface: Typeface, width: Points) -> list[_Word]:
    """Put tokens on lines, and cut those that are longer than one."""
    words: list[_Word] = []
    line, left = 0, 0.0
    for text in texts:
        shown = typeface.fit(typeface.show(text, dots=False), SIZE, width - 4)
        own = typeface.measure(shown, SIZE) + 3
        if left and left + own > width:
            line, left = line + 1, 0.0
        written = shown.lstrip(" ")  # SVG leaves out spaces at the ends of a text
        lead = typeface.measure(shown[: len(shown) - len(written)], SIZE)
        words.append(_Word(text=written, line=line, left=left, width=own, lead=lead))
        line, left = (line + 1, 0.0) if text.endswith("\n") else (line, left + own)
    return words


def _draw_token(panel: Panel, word: _Word, colour: Sequence[float] | None) -> None:
    """Draw a token of the text on its colour, or in grey on none."""
    top = word.line * LINE
    if colour is not None:
        panel.fill((word.left, top + 1.5), (word.width - 0.6, LINE - 3), colour)
    ink = GREY if colour is None else ink_on(colour)
    middle = (word.left + 1.2 + word.lead, top + LINE / 2)
    panel.write(word.text, middle, size=SIZE, colour=ink)


def _write_tokens(panel: Panel, texts: Sequence[str], columns: range) -> None:
    """Write the tokens above a heat map."""
    panel.write("layer", (-5, -8), colour=GREY, is_right=True)
    for x, i in enumerate(columns):
        place = (x * CELL_WIDTH + 2.5, -8)
        if i < len(texts):
            panel.write(panel.typeface.show(texts[i]), place, room=CELL_WIDTH - 4)
        else:
            panel.write("next", place, colour=GREY)


def _write_layer(panel: Panel, prediction: Prediction, y: int) -> None:
    """Write a layer's number beside its row, in grey if it does not vote."""
    votes = prediction.readout == "ensemble" or prediction.jsd_to_ensemble is not None
    place = (-5, (y + 0.5) * CELL_HEIGHT)
    panel.write(str(prediction.readout), place, colour=INK if votes else GREY, is_right=True)


def _draw_guess(
    panel: Panel,
    corner: Place,
    guess: str,
    colour: Sequence[float] | None,
    *,
    is_right: bool,
    weight: float | None,
) -> None:
    """Draw one cell of a heat map."""
    left, top = corner
    ink = GREY if colour is None else ink_on(colour)
    if colour is not None:
        panel.fill((left + 0.4, top + 0.4), (CELL_WIDTH - 0.8, CELL_HEIGHT - 0.8), colour)
    if is_right:
        size = (CELL_WIDTH - 2.2, CELL_HEIGHT - 2.2)
        panel.frame((left + 1.1, top + 1.1), size, ink)
    if weight is not None:
        line = (left + 2.5, top + CELL_HEIGHT - 2.9)
        panel.fill(line, ((CELL_WIDTH - 5) * weight, 1), ink)
    middle = (left + 2.8, top + CELL_HEIGHT / 2)
    shown = panel.typeface.show(guess)
    panel.write(shown, middle, colour=ink, room=CELL_WIDTH - 5.6)
