"""Tables as HTML, for notebooks: an object that has `_repr_html_` is shown by it there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def to_html(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, notes: Sequence[str] = ()
) -> str:
    """Write a table, in the colours of the page that shows it.

    Args:
        header: Names of the columns.
        rows: Cells, as plain text.
        notes: Sentences below it.

    Returns:
        The table, which scrolls sideways where it is too wide, and the notes as paragraphs.
    """
    align = "text-align: left; white-space: nowrap; padding: .15em .8em .15em 0"
    head = "".join(f'<th style="{align}">{escape(cell)}</th>' for cell in header)
    lines = [[f'<td style="{align}">{escape(cell)}</td>' for cell in row] for row in rows]
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in lines)
    below = "".join(f"<p>{escape(note)}</p>" for note in notes)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div style="overflow-x: auto">{table}</div>{below}'
