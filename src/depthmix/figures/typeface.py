"""What the fonts of this machine can write in a figure, and how wide it becomes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from matplotlib.font_manager import FontProperties, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.textpath import text_to_path

from depthmix.depth.token_texts import visible_text

MAIN_FAMILY = "DejaVu Sans"
"""The font that comes with matplotlib."""

Points = float | int
"""A length in points, 72 to the inch."""

SIGNS = "…0123456789ABCDEFU+⟨⟩"
"""What stands for what is cut off or cannot be written."""


@dataclass(frozen=True, kw_only=True)
class Typeface:
    """Fonts that together write a text."""

    families: tuple[str, ...]
    """Names of fonts; a character is taken from the first that has it."""

    unwritable: frozenset[str]
    """Characters of the text that no font has."""

    def properties(self, size: Points) -> FontProperties:
        """Give the fonts at a size in points, as matplotlib takes them."""
        return FontProperties(family=list(self.families), size=size)

    def show(self, text: str, *, dots: bool = True) -> str:
        """Write a text with nothing in it that is hidden or has no font (`visible_text`)."""
        return visible_text(text, dots=dots, unwritable=self.unwritable)

    def measure(self, text: str, size: Points) -> float:
        """Measure the width of a line of text, points."""
        # A drawn width leaves out spaces at the end.
        return _measure(f"{text}|", self.families, size) - _measure("|", self.families, size)

    def fit(self, text: str, size: Points, width: Points) -> str:
        """Cut a text so that it is no wider than `width` points, with `…` where it is cut."""
        if self.measure(text, size) <= width:
            return text
        least, most = 0, len(text) - 1
        while least < most:  # the longest beginning that fits
            middle = (least + most + 1) // 2
            fits = self.measure(f"{text[:middle]}…", size) <= width
            least, most = (middle, most) if fits else (least, middle - 1)
        return f"{text[:least]}…"


def find_typeface(texts: Iterable[str]) -> Typeface:
    """Find fonts of this machine that have every character, as far as there are any.

    Args:
        texts: Everything that is to be written.

    Returns:
        The fonts, matplotlib's own first.
    """
    missing = {character for text in texts for character in text}.union(SIGNS)
    entries = [
        entry
        for entry in fontManager.ttflist
        # The font of last resort has a box for each character.
        if (entry.style, entry.weight) == ("normal", 400) and "Last Resort" not in entry.name
    ]
    entries.sort(
        key=lambda entry: (entry.name != MAIN_FAMILY, "Sans" not in entry.name, entry.name)
    )
    families = [MAIN_FAMILY]
    for entry in entries:
        if not missing:
            break
        font = FT2Font(entry.fname)
        found = {character for character in missing if font.get_char_index(ord(character))}
        if found and entry.name != MAIN_FAMILY:
            families.append(entry.name)
        missing -= found
    return Typeface(families=tuple(families), unwritable=frozenset(missing))


@lru_cache(maxsize=10_000)
def _measure(text: str, families: tuple[str, ...], size: Points) -> float:
    """Measure what a line of text covers, points."""
    properties = FontProperties(family=list(families), size=size)
    return text_to_path.get_text_width_height_descent(text, properties, False)[0]
