"""Runs as independent processes: here or on a cluster, by submitit, each through accelerate."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import submitit
import torch
from submitit.core.utils import FailedJobError
from submitit.helpers import DelayedSubmission

from depthmix.files.settings import underscored
from depthmix_replication.worker import Assignment
from depthmix_replication.workspace import Workspace

MINUTES_OF_A_DAY = 60 * 24
"""Limit of a cluster's jobs where nothing is said; submitit's own is five minutes."""

MINUTES_OF_A_MONTH = 30 * MINUTES_OF_A_DAY
"""Local jobs are not ended for their time."""

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"

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
    """Further parameters of submitit's executor on a cluster, such as `slurm_partition`,
    `timeout_min` (a day by default) or `gpus_per_node` (one for each process by default)."""

    def __post_init__(self) -> None:
        for name in ("jobs", "num_processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.kind == "local" and self.options:
            raise ValueError("`slurm` is for `launcher=slurm`; pass it, or leave the options out.")
        if self.kind == "slurm" and self.jobs > 1:
            raise ValueError(
                "`jobs` is for this machine, and a cluster decides for itself; leave it out."
            )


def launch(assignments: Sequence[Assignment], launcher: Launcher) -> Iterator[Assignment]:
    """Run assignments, each in a process of its own.

    Args:
        assignments: Runs of one workspace, together in one process each.
        launcher: Where.

    Yields:
        Each assignment as its process ends. On a cluster, whose jobs outlive this process, none:
        they are only submitted.

    Raises:
        RuntimeError: If a process has failed, after all the others are done, and names its log; or
            if a cluster refuses a job.
        ValueError: If submitit knows no such option, or there are fewer GPUs than processes.
    """
    if not assignments:
        return
    executor = _make_executor(assignments[0].root / "logs", launcher)
    slots = list(range(launcher.jobs))
    waiting, running, failed = list(assignments), [], []
    while waiting or running:
        while waiting and (launcher.kind != "local" or slots):
            assignment = waiting.pop(0)
            slot = slots.pop(0) if launcher.kind == "local" else None
            devices = None if slot is None else share_devices(slot, launcher.num_processes)
            task = Task(
                assignment=assignment, num_processes=launcher.num_processes, devices=devices
            )
            try:
                job = executor.submit(task)
            except FailedJobError as error:  # what sbatch has said
                raise RuntimeError(
                    f"The cluster refuses the job, saying '{error}'; `slurm` sets its options, "
                    "such as `slurm.gpus_per_node=0` where there are no GPUs."
                ) from error
            running.append((job, assignment, slot))
        if launcher.kind != "local":
            return
        time.sleep(SECONDS_BETWEEN_LOOKS)
        for job, assignment, slot in [entry for entry in running if entry[0].done()]:
            running.remove((job, assignment, slot))
            slots.append(slot)
            if job.exception() is None:
                yield assignment
            else:
                failed.append(job.paths.stderr)
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(assignments)} processes have failed; {failed[0]} says why. "
            "Start the same command again to go on with what is missing."
        )


@dataclass(frozen=True, kw_only=True)
class Task:
    """What submitit calls: the work on an assignment, and again where a cluster interrupts it."""

    assignment: Assignment
    """Runs of one workspace."""

    num_processes: int
    """Processes of one run."""

    devices: Sequence[str] | None
    """GPUs for them, as `execute` takes them."""

    def __call__(self) -> None:
        """Do the work."""
        execute(self.assignment, self.num_processes, self.devices)

    def checkpoint(self) -> DelayedSubmission:
        """Queue the same work again: what is finished stays, and a run goes on from its checkpoint.

        submitit calls this when a job is preempted, or at the end of its time.
        """
        return DelayedSubmission(self)


def share_devices(slot: int, num_processes: int) -> list[str]:
    """Choose the GPUs of one of the jobs that run side by side on this machine.

    Args:
        slot: Number of the job, from 0.
        num_processes: Processes of its run, one per GPU.

    Returns:
        As many GPUs as processes, as CUDA_VISIBLE_DEVICES names them; jobs share where there are
        too few for all. Empty on a machine without any.

    Raises:
        ValueError: If there are fewer GPUs than processes.
    """
    named = os.environ.get(VISIBLE_DEVICES)
    every = range(torch.cuda.device_count()) if named is None else named.split(",")
    devices = [str(device) for device in every if str(device).strip()]
    if num_processes > max(len(devices), 1):
        raise ValueError(
            f"`num_processes` must be at most the {len(devices)} GPUs of this machine, got "
            f"{num_processes}; a run without GPUs takes one process."
        )
    first = slot * num_processes
    numbers = range(first, first + num_processes) if devices else ()
    return [devices[number % len(devices)] for number in numbers]


def execute(
    assignment: Assignment, num_processes: int, devices: Sequence[str] | None = None
) -> None:
    """Take the runs that nobody else works on, and work on them through accelerate.

    Args:
        assignment: Runs of one workspace.
        num_processes: Processes of one run.
        devices: GPUs for them; `None` takes the first ones of the machine where this runs.

    Raises:
        CalledProcessError: If the work has failed.
    """
    workspace = Workspace(assignment.root)
    with ExitStack() as locks:
        taken = []
        for run, readings in assignment.runs:
            with workspace.claim(run, "worker") as idle:
                pass  # taken by a worker whose owner is gone?
            if not (idle and locks.enter_context(workspace.claim(run))):
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
        # Any free port, since other runs may be on the same machine.
        command += ["--multi_gpu", "--main_process_port", "0"] if num_processes > 1 else []
        module = ["-m", "depthmix_replication.worker", str(path)]
        # submitit hides all GPUs from local jobs, and a trainer spreads a batch over all that it
        # sees.
        visible = share_devices(0, num_processes) if devices is None else devices
        environment = {**os.environ, VISIBLE_DEVICES: ",".join(visible)}
        subprocess.run([*command, *module], check=True, env=environment)


def _make_executor(logs: Path, launcher: Launcher) -> submitit.AutoExecutor:
    """Set up submitit, and explain what it does not know."""
    executor = submitit.AutoExecutor(folder=logs, cluster=launcher.kind)
    parameters: dict[str, Any] = {"timeout_min": MINUTES_OF_A_MONTH}
    if launcher.kind == "slurm":
        parameters = {"timeout_min": MINUTES_OF_A_DAY, "gpus_per_node": launcher.num_processes}
    for name, value in underscored(launcher.options or {}).items():
        parameters[name] = int(value) if str(value).isdecimal() else value
    try:
        executor.update_parameters(**parameters)
    except (AssertionError, NameError) as error:  # how submitit refuses an option
        raise ValueError(
            f"`slurm` must hold parameters of submitit's executor, and it says: {error}."
        ) from error
    return executor


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

    Raises:
        ValueError: If no run would share a process.
    """
    if runs_per_job < 1:
        raise ValueError(f"`runs_per_job` must be at least 1, got {runs_per_job}.")
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
