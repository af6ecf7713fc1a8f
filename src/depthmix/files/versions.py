"""What code a result was made with."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path


def list_versions(packages: Iterable[str]) -> dict[str, str]:
    """List the versions of installed packages and, in a checkout of this one, its commit.

    Args:
        packages: Names of distributions.

    Returns:
        Versions by name, and `commit` as `find_commit` gives it, where there is one.

    Raises:
        PackageNotFoundError: If one is not installed.
    """
    commit = find_commit(Path(__file__))
    return {name: version(name) for name in packages} | ({"commit": commit} if commit else {})


@functools.cache
def find_commit(file: Path) -> str | None:
    """Find the commit that a file is checked out at.

    Args:
        file: A file.

    Returns:
        The hash's first nine digits, with a `+` where tracked files of the repository differ from
        it; `None` if no repository tracks the file, or git is missing.
    """

    def ask(*arguments: str) -> str | None:
        # Without locks: killed in between, `git status` would leave one in the repository.
        command = ["git", "--no-optional-locks", "-C", str(file.parent), *arguments]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    # An environment may lie inside a repository of something else.
    if ask("ls-files", "--error-unmatch", file.name) is None:
        return None
    commit = ask("rev-parse", "--short=9", "HEAD")
    changed = "+" if ask("status", "--porcelain", "--untracked-files=no") else ""
    return commit and f"{commit}{changed}"
