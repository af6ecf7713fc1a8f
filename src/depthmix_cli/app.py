"""What `depthmix` can do, and how its mistakes are told."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from itertools import pairwise
from typing import Any

from cyclopts import App

from depthmix_cli.additions import check_addition, find_addition, list_additions
from depthmix_cli.flags import add_flags
from depthmix_cli.spelling import spell_out

app = App(
    name="depthmix",
    help="Tune language models by Mixture-of-Depths Ensemble: the last layers vote on each token.",
    version=lambda: version("depthmix"),
)

PLACES = {
    "train": "depthmix_cli.tuning:train",
    "add-exits": "depthmix_cli.speeding:add_exits",
    "calibrate": "depthmix_cli.speeding:calibrate",
    "bench": "depthmix_cli.speeding:bench",
    "generate": "depthmix_cli.answering:generate",
    "chat": "depthmix_cli.answering:chat",
    "export": "depthmix_cli.leaving:export",
    "run": "depthmix_cli.running:run",
    "lens": "depthmix_cli.looking:lens",
    "report": "depthmix_cli.looking:report",
    "evaluate": "depthmix_cli.measuring:evaluate",
    "info": "depthmix_cli.tuning:info",
    "audit": "depthmix_cli.measuring:audit",
    "compare": "depthmix_cli.measuring:compare",
}
"""What `depthmix` can do by itself: each command's import path, imported when it is asked for."""

for own, place in PLACES.items():
    app.command(place, name=own)

for addition in list_additions().values():
    app.command(addition.value, name=addition.name)


def run(argv: Sequence[str]) -> int:
    """Run a command; a mistake becomes one sentence on standard error.

    Args:
        argv: Arguments.

    Returns:
        Exit code, as `depthmix_cli.main` gives it.
    """
    try:
        check_addition(argv)
        for name in (*PLACES, *list_additions()) if not argv or argv[0] in app.help_flags else ():
            app[name]  # imported, or help could not say what it does
        app(_spell_out(argv), result_action="return_none")
    except (ValueError, TypeError, OSError, RuntimeError, FloatingPointError) as error:
        if os.environ.get("DEPTHMIX_DEBUG") == "1":
            raise
        # Messages of other libraries may span lines.
        message = " ".join(_explain(error, argv).split())
        print("depthmix:", add_flags(message, _command(argv)), file=sys.stderr)
        missing = isinstance(error, ImportError)  # an extra, which says all itself
        if isinstance(error, TypeError | RuntimeError) and not missing:  # may be no mistake
            print("DEPTHMIX_DEBUG=1 shows where it came from.", file=sys.stderr)
        return 1
    return 0


def load_command(name: str) -> Callable[..., Any]:
    """Import one of the package's own commands.

    Args:
        name: One of `PLACES`.
    """
    module, _, function = PLACES[name].partition(":")
    return getattr(import_module(module), function)


def _command(argv: Sequence[str]) -> Callable[..., Any] | None:
    """Find the command that was run."""
    if argv and argv[0] in PLACES:
        return load_command(argv[0])
    return find_addition(argv)


def _spell_out(argv: Sequence[str]) -> list[str]:
    """Write what may be written in short with its section; only commands here have such options."""
    own = bool(argv) and argv[0] in PLACES
    return spell_out(argv, load_command(argv[0]) if own else None)


def _explain(error: Exception, argv: Sequence[str]) -> str:
    """Name the argument that an error of the system is about, by the path in it."""
    if not isinstance(error, OSError) or error.errno is None or error.filename is None:
        return str(error)
    path = str(error.filename)
    for flag, value in pairwise(argv):
        if flag.startswith("--") and f"{path}/".startswith(f"{value}/".partition("/")[0] + "/"):
            return f"`{flag}` cannot be used: {path} ({error.strerror}); choose another place."
    return f"{path} cannot be used ({error.strerror})."
