"""JSON as it lies in files: each name once, and a file that is none is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_object(path: Path, *, way_out: str) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: The file, which exists.
        way_out: What to do if it is damaged, for the end of the sentence.

    Returns:
        The object.

    Raises:
        ValueError: If the file is empty, cut off, or holds something else.
    """
    text = path.read_bytes()
    try:
        content = parse(text.decode("utf-8"))
    except ValueError as error:
        state = f"cannot be read ({error})" if text.strip() else "is empty"
        raise ValueError(f"{path} {state}; {way_out}.") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(f"{path} must hold named values, and holds a {kind}; {way_out}.")
    return content


def parse(text: str) -> Any:
    """Read a JSON text in which every name stands once.

    Args:
        text: The text.

    Returns:
        Its content.

    Raises:
        ValueError: If it is no JSON, or an object has two values of one name.
    """
    try:
        return json.loads(text, object_pairs_hook=_unite)
    except RecursionError as error:
        raise ValueError("its values are nested too deeply") from error


def _unite(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its pairs, of which Python would keep the last of a name."""
    united = dict(pairs)
    if len(united) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} stands twice in one object")
    return united
