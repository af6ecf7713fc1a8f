"""The command that runs the paper's experiments."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def reproduce(
    experiments: list[str],
    *,
    scale: Literal["paper", "small", "toy"] = "small",
    model: str | None = None,
    seeds: str | None = None,
    subjects: str | None = None,
    workspace: Path = Path("reproduction"),
    results: Path | None = None,
    launcher: Literal["local", "slurm"] = "local",
    jobs: int = 1,
    num_processes: int = 1,
    runs_per_job: int = 1,
    slurm: dict[str, str] | None = None,
    data_dir: str | None = None,
    judge: dict[str, str] | None = None,
    dry_run: bool = False,
) -> None:
    """Run experiments of the paper, and write their tables and figures.

    What is finished is not run again, and an interrupted run goes on where it stopped when the same
    command is started again. For example:

    `depthmix reproduce table2 fig6 --scale small --subjects arc_easy`

    Args:
        experiments: `table1`, …, `fig8` and others (docs/replication.md), TOML files of your own,
            or `all`, which without a judge leaves out what needs one.
        scale: `paper`, `small` (135 M parameters on a CPU) or `toy` (a test of the machinery).
        model: Another model than the scale's.
        seeds: Training seeds, with commas between them, instead of the scale's.
        subjects: Some of the experiments' data sets, with commas between them.
        workspace: Folder of runs; several machines may share it.
        results: Folder of tables and figures, by default in the workspace.
        launcher: `local` starts processes here, `slurm` submits them to a cluster and returns.
        jobs: Processes at a time on this machine.
        num_processes: Processes of one run, one for each of its GPUs.
        runs_per_job: Runs that share a process.
        slurm: Parameters of submitit's executor, with a dot: `--slurm.slurm-partition gpu`.
        data_dir: Local folder of data sets, instead of DEPTHMIX_DATA or public sources.
        judge: Who rates MT-Bench: `model`, `base_url`, …, with a dot. Another `model` is another
            evaluation.
        dry_run: List the runs and estimate their time; start nothing.
    """
    from depthmix.files.settings import read_options
    from depthmix_replication.planning import Selection, plan
    from depthmix_replication.workspace import check_place

    given = {"model": model, "seeds": seeds, "subjects": subjects}
    for name, value in given.items():
        if value is not None and not value.replace(",", "").strip():
            raise ValueError(f"`{name}` must not be empty; leave it out for what the scale has.")
    listed = {"seeds": seeds or "", "subjects": subjects or ""}
    selection = Selection(models=(model,) if model else (), **read_options(None, listed, Selection))
    if results is not None:
        check_place("results", results)
    planned = plan(
        experiments,
        scale=scale,
        selection=selection,
        workspace=workspace,
        judge=judge,
        data_dir=data_dir,
    )
    if dry_run:
        print(planned)
        return
    # What runs and shows takes seconds to import.
    from depthmix_replication.launching import Launcher
    from depthmix_replication.reproduce import reproduce

    pages = reproduce(
        planned,
        launcher=Launcher(kind=launcher, jobs=jobs, num_processes=num_processes, options=slurm),
        runs_per_job=runs_per_job,
        results=results,
    )
    for page in pages:
        print(f"Written: {page}")
