"""Commands that other packages add to `depthmix`.

A package adds one by an entry point of the group `depthmix.commands`: its name is the command's,
and its value the import path of the function, which is imported when it is asked for, or shown.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

GROUP = "depthmix.commands"
"""The group of the entry points."""

KNOWN = {"reproduce": "pip install -e replication` in a clone of depthmix"}
"""Commands of packages beside this one, and how these are installed."""


@functools.cache
def list_additions() -> dict[str, EntryPoint]:
    """Find the commands that installed packages add, by name. Nothing is imported."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def find_addition(argv: Sequence[str]) -> Callable[..., Any] | None:
    """Find the function of an added command.

    Args:
        argv: Arguments of the command line.

    Returns:
        The function, or None if the arguments name no such command.
    """
    entry = list_additions().get(argv[0]) if argv else None
    return None if entry is None else entry.load()


def check_addition(argv: Sequence[str]) -> None:
    """Refuse a command whose package is not installed.

    Args:
        argv: Arguments of the command line.

    Raises:
        RuntimeError: If they name one.
    """
    if argv and argv[0] in KNOWN and argv[0] not in list_additions():
        raise RuntimeError(
            f"`depthmix {argv[0]}` is a package of its own, which is not installed: run "
            f"`{KNOWN[argv[0]]}."
        )
