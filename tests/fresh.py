"""Code in a process of its own, where nothing is imported yet."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

LAB = ("trl", "datasets", "pyarrow", "pydantic", "pydantic_core", "cyclopts", "pooch", "gguf")
LAB += ("scipy", "matplotlib", "matplotlib_venn", "lm_eval", "openai", "submitit")
"""Libraries of the extras that no library of the core needs."""

WITHOUT_LAB = f"import sys\nsys.modules.update(dict.fromkeys({LAB!r}))\n"
"""Code after which these cannot be imported, nor found: as where they are not installed."""


def run_fresh(
    code: str, *arguments: str | Path, folder: Path | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process.

    Args:
        code: Python, in which `sys.argv[1:]` are the arguments.
        arguments: Those.
        folder: Where it runs.
        check: Fail with what it printed if it ends with an error.

    Returns:
        Its end, with what it wrote.
    """
    command: Sequence[str] = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done
