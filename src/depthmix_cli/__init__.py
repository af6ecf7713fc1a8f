"""The command `depthmix`.

It stands beside the package, whose import takes seconds: the commands import it when they run, and
`depthmix --help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a mistake becomes one sentence on standard error.

    Args:
        argv: Arguments; `None` takes the process's, and says that the process is the command's own.

    Returns:
        Exit code: 0, or 1 after an error. With DEPTHMIX_DEBUG=1 errors keep their traceback.
    """
    if argv is None:
        import_module("depthmix_cli.process")
    try:
        from depthmix_cli.app import run
    except ModuleNotFoundError:
        from depthmix.libraries.extras import MissingExtraError, require

        try:
            require("lab", "The command `depthmix`")
        except MissingExtraError as missing:
            print("depthmix:", missing, file=sys.stderr)
            return 1
        raise
    return run(sys.argv[1:] if argv is None else argv)
