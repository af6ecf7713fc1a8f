"""Numbers as they stand in tables of Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """Render a Markdown table, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    """Write a number with as many digits as it deserves."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def made_by(results: dict[str, Any]) -> str:
    """Say what made the numbers."""
    threads = f"{results['threads']} threads"
    return (
        f"`{results['command']}` on {results['device']}, {threads}, torch {results['torch']}, "
        f"commit {results['commit']}."
    )
