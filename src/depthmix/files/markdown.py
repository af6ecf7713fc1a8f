"""Text in Markdown that stays what it is."""

from __future__ import annotations

ESCAPES = str.maketrans({sign: f"\\{sign}" for sign in "\\`*_|<>[]~&$"})
"""Signs that Markdown would read as markup."""


def escape(text: str) -> str:
    """Keep Markdown from reading markup in a text."""
    return text.translate(ESCAPES)
