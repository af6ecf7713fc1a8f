"""The command `depthmix`.

It stands beside the package, whose import takes seconds: the commands import it when they run, and
`depthmix --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import pairwise
from typing import Any

from cyclopts import App

from depthmix_cli.additions import check_addition, find_addition, list_additions
from depthmix_cli.answering import chat, generate
from depthmix_cli.flags import add_flags
from depthmix_cli.looking import lens, report
from depthmix_cli.measuring import audit, compare, evaluate
from depthmix_cli.tuning import info, train

app = App(
    name="depthmix",
    help="Tune language models by Mixture-of-Depths Ensemble: the last layers vote on each token.",
    version=lambda: version("depthmix"),
)

COMMANDS = (train, generate, chat, lens, report, evaluate, info, audit, compare)
"""What `depthmix` can do by itself."""

for command in COMMANDS:
    app.command(command)

for addition in list_additions().values():
    app.command(addition.value, name=addition.name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a mistake becomes one sentence on standard error.

    Args:
        argv: Arguments; `None` takes the process's.

    Returns:
        Exit code: 0, or 1 after an error. With DEPTHMIX_DEBUG=1 errors keep their traceback.
    """
    given = sys.argv[1:] if argv is None else argv
    try:
        check_addition(given)
        for name in list_additions() if not given or given[0] in app.help_flags else ():
            app[name]  # imported, or help could not say what it does
        app(argv, result_action="return_none")
    except (ValueError, TypeError, OSError, RuntimeError, FloatingPointError) as error:
        if os.environ.get("DEPTHMIX_DEBUG") == "1":
            raise
        # Messages of other libraries may span lines.
        message = " ".join(_explain(error, argv).split())
        print("depthmix:", add_flags(message, _command(argv)), file=sys.stderr)
        if isinstance(error, TypeError | RuntimeError):  # may be no mistake of the user's
            print("DEPTHMIX_DEBUG=1 shows where it came from.", file=sys.stderr)
        return 1
    return 0


def _command(argv: Sequence[str] | None) -> Callable[..., Any] | None:
    """Find the command that was run."""
    given = sys.argv[1:] if argv is None else argv
    own = next((one for one in COMMANDS if given and one.__name__ == given[0]), None)
    return own or find_addition(given)


def _explain(error: Exception, argv: Sequence[str] | None) -> str:
    """Name the argument that an error of the system is about, by the path in it."""
    given = sys.argv[1:] if argv is None else argv
    if not isinstance(error, OSError) or error.errno is None or error.filename is None:
        return str(error)
    path = str(error.filename)
    for flag, value in pairwise(given):
        if flag.startswith("--") and f"{path}/".startswith(f"{value}/".partition("/")[0] + "/"):
            return f"`{flag}` cannot be used: {path} ({error.strerror}); choose another place."
    return f"{path} cannot be used ({error.strerror})."
