"""Runs as independent processes: here or on a cluster, by submitit, each through accelerate."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import submitit

from depthmix.options import underscored
from depthmix.reproduction.worker import Assignment
from depthmix.reproduction.workspace import Workspace

MINUTES_OF_A_MONTH = 60 * 24 * 30
"""Local jobs are not ended for their time."""

SECONDS_BETWEEN_LOOKS = 1.0


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """Where processes run, and how many at a time."""

    kind: Literal["local", "slurm"] = "local"
    """`local`: on this machine. `slurm`: as jobs of a cluster."""

    jobs: int = 1
    """Processes at a time on this machine."""

    num_processes: int = 1
    """Processes of one run, one per GPU."""

    options: Mapping[str, Any] | None = None
    """Further parameters of submitit's executor, such as `slurm_partition` or `timeout_min`."""

    def __post_init__(self) -> None:
        for name in ("jobs", "num_processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")


def launch(assignments: Sequence[Assignment], launcher: Launcher) -> Iterator[Assignment]:
    """Run assignments, each in a process of its own.

    Args:
        assignments: Runs of one workspace, together in one process each.
        launcher: Where.

    Yields:
        Each assignment as its process ends. On a cluster, whose jobs outlive this process, none:
        they are only submitted.

    Raises:
        RuntimeError: If a process has failed, after all the others are done; names its log.
    """
    if not assignments:
        return
    logs = assignments[0].root / "logs"
    executor = submitit.AutoExecutor(folder=logs, cluster=launcher.kind)
    parameters: dict[str, Any] = {}
    if launcher.kind == "local":
        parameters["timeout_min"] = MINUTES_OF_A_MONTH
    for name, value in underscored(launcher.options or {}).items():
        parameters[name] = int(value) if str(value).isdecimal() else value
    executor.update_parameters(**parameters)
    waiting, running, failed = list(assignments), [], []
    while waiting or running:
        while waiting and (launcher.kind != "local" or len(running) < launcher.jobs):
            assignment = waiting.pop(0)
            running.append(
                (executor.submit(execute, assignment, launcher.num_processes), assignment)
            )
        if launcher.kind != "local":
            return
        time.sleep(SECONDS_BETWEEN_LOOKS)
        for job, assignment in [pair for pair in running if pair[0].done()]:
            running.remove((job, assignment))
            if job.exception() is None:
                yield assignment
            else:
                failed.append(job.paths.stderr)
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(assignments)} processes have failed; {failed[0]} says why. "
            "Start the same command again to go on with what is missing."
        )


def execute(assignment: Assignment, num_processes: int) -> None:
    """Take the runs that nobody else works on, and work on them through accelerate.

    Args:
        assignment: Runs of one workspace.
        num_processes: Processes of one run.

    Raises:
        CalledProcessError: If the work has failed.
    """
    workspace = Workspace(assignment.root)
    with ExitStack() as locks:
        taken = []
        for run, readings in assignment.runs:
            if not locks.enter_context(workspace.claim(run)):
                print(f"{run.key} is being run by another process", flush=True)
            elif not workspace.is_finished(run, readings):
                workspace.clear(run)
                taken.append((run, readings))
        if not taken:
            return
        name = f"{taken[0][0].key}-{len(taken)}.json"
        path = replace(assignment, runs=taken).save(workspace.root / "assignments" / name)
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--num_processes", str(num_processes), "--num_machines", "1"]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--multi_gpu"] if num_processes > 1 else []
        module = ["-m", "depthmix.reproduction.worker", str(path)]
        subprocess.run([*command, *module], check=True)


def plan_assignments(
    workspace: Workspace,
    runs: Mapping[str, tuple[Any, tuple[Any, ...]]],
    *,
    runs_per_job: int,
    data_dir: str | None = None,
    judge: Mapping[str, Any] | None = None,
) -> list[Assignment]:
    """Divide what is not finished among processes.

    Args:
        workspace: Where the runs are.
        runs: Runs and their readings by key.
        runs_per_job: Runs that share a process, and its seconds of imports.
        data_dir: Local folder of data sets.
        judge: Options of the judge.

    Returns:
        Assignments, seed by seed; none if all is finished.
    """
    left = [pair for pair in runs.values() if not workspace.is_finished(*pair)]
    # Seed by seed, so that there is something to compare before the last run.
    left.sort(key=lambda pair: pair[0].settings.get("training", {}).get("seed", 0))
    root: Path = workspace.root
    return [
        Assignment(
            root=root, runs=left[start : start + runs_per_job], data_dir=data_dir, judge=judge
        )
        for start in range(0, len(left), runs_per_job)
    ]
