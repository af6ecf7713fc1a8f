"""A part of a lens as a table, for notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from depthmix.files.html import to_html

SHOWN = 16
"""Tokens that a notebook shows of a lens; a page has all."""


def write_guesses(
    tokens: Sequence[str],
    guesses: Iterable[tuple[str, Sequence[Sequence[str]]]],
    *,
    opening: int,
) -> str:
    """Write the likeliest guess of each layer in place of some tokens.

    Args:
        tokens: The text's tokens.
        guesses: Name of each layer, and what it guesses after each token, likeliest first.
        opening: Token that is shown first, counted from 0.

    Returns:
        The table, one row for each layer and one column for each token.
    """
    first = max(0, min(opening - 1, len(tokens) - SHOWN))
    columns = range(first, min(first + SHOWN, len(tokens)))
    rows = [(name, *(likeliest[i][0] for i in columns)) for name, likeliest in guesses]
    named = [tokens[i + 1] if i + 1 < len(tokens) else "next" for i in columns]
    return to_html(("layer", *named), rows)
