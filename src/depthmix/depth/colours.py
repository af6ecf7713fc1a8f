"""The colours of a lens, and of depth in a terminal, which say the same in grey."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

RAMP = ("#fbfaf4", "#e6f0c8", "#b5dcbd", "#74c0be", "#3f9cbb", "#2a6dab", "#213f88")
"""Stops of the scale, darker step by step, and pale behind most texts. The page of a lens has the
same in `lens_paint.js`."""


def to_rgb(colour: str) -> tuple[float, float, float]:
    """Read a colour such as `#213f88` as red, green and blue from 0 to 1."""
    red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return red, green, blue


def blend(share: float, ramp: Sequence[str] = RAMP) -> tuple[float, float, float]:
    """Find the colour at a place of the scale.

    Args:
        share: 0 for the palest end, 1 for the darkest.
        ramp: The scale's stops.

    Returns:
        Red, green and blue from 0 to 1.
    """
    place = share * (len(ramp) - 1)
    lower = min(int(place), len(ramp) - 2)
    below, above = to_rgb(ramp[lower]), to_rgb(ramp[lower + 1])
    red, green, blue = (b + (place - lower) * (a - b) for b, a in zip(below, above, strict=True))
    return red, green, blue


def ink_on(background: Iterable[float]) -> str:
    """Choose black or white for text on a background of its own, whichever has more contrast.

    Args:
        background: Red, green and blue from 0 to 1; further numbers are ignored.
    """
    parts = zip((0.2126, 0.7152, 0.0722), background, strict=False)
    lightness = math.sqrt(sum(part * channel**2 for part, channel in parts))
    return "black" if lightness > 0.43 else "white"
