"""The command: run what is missing, and show what is finished."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from depthmix_replication.gathering import gather
from depthmix_replication.launching import Launcher, launch, plan_assignments
from depthmix_replication.pages import check_page, write_findings
from depthmix_replication.planning import Reproduction, needs_judge
from depthmix_replication.test_sets import fetch_test_sets
from depthmix_replication.trials import unique_runs


def reproduce(
    planned: Reproduction,
    *,
    launcher: Launcher | None = None,
    runs_per_job: int = 1,
    results: Path | None = None,
) -> Iterator[Path]:
    """Run what is missing, and write tables and figures of every experiment that is complete.

    Args:
        planned: What `plan` found.
        launcher: Where processes run; `None` runs one at a time here.
        runs_per_job: Runs that share a process.
        results: Folder for tables and figures, one folder inside for each experiment; `None` takes
            `results/SCALE` in the workspace.

    Yields:
        The page of each complete experiment.

    Raises:
        ValueError: If an experiment needs a judge and has none.
        FileExistsError: If a page is there that shows more; nothing is run then.
        FileNotFoundError: If a run leaves out the questions of all test sets, and one is neither at
            hand nor to be had; nothing is run on this machine then.
        RuntimeError: If a run has failed, after the pages of all that is complete.
    """
    _check_judge(planned)
    workspace = planned.workspace
    folder = results or workspace.root / "results" / planned.scale
    for experiment, trials in planned.trials.values():
        check_page(folder / experiment.name, trials)
    start = launcher or Launcher()
    if start.kind == "local":  # a cluster's nodes look for themselves
        untrained = [run for run, _ in planned.runs.values() if not workspace.is_trained(run)]
        left_out = {name for run in untrained for name in run.settings["data"].get("without", ())}
        fetch_test_sets(left_out, data_dir=planned.data_dir)
    assignments = plan_assignments(
        workspace,
        planned.runs,
        runs_per_job=runs_per_job,
        data_dir=planned.data_dir,
        judge=planned.judge,
    )
    print(f"{len(planned.runs)} runs; {len(assignments)} processes to start", file=sys.stderr)
    failure = None
    try:
        for done, assignment in enumerate(launch(assignments, start), start=1):
            first, *others = (run.key for run, _ in assignment.runs)
            more = f" and {len(others)} more" if others else ""
            print(f"{done} of {len(assignments)} done: {first}{more}", file=sys.stderr)
    except RuntimeError as error:  # some have failed; what is complete is shown all the same
        failure = error
    for experiment, trials in planned.trials.values():
        left = [
            key for key, pair in unique_runs(trials).items() if not workspace.is_finished(*pair)
        ]
        if left:
            print(f"{experiment.name} waits for {len(left)} runs: {left[0]}, …", file=sys.stderr)
            continue
        findings = gather(experiment, planned.scale, trials, workspace)
        yield write_findings(findings, folder / experiment.name)
    if failure is not None:
        raise failure


def _check_judge(planned: Reproduction) -> None:
    for experiment, trials in planned.trials.values():
        if planned.judge is None and needs_judge(trials):
            raise ValueError(
                f"`judge` must be given for {experiment.name}, whose answers a model rates; pass "
                "`judge.model` and, for another endpoint than OpenAI's, `judge.base_url`, or "
                "leave the experiment out."
            )
