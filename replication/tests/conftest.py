"""The same set-up as for the library's own tests, and what several files share."""

import os

import pytest

import environment  # noqa: F401
from depthmix_replication.launching import plan_assignments
from depthmix_replication.planning import plan
from depthmix_replication.worker import work


@pytest.fixture
def out_of_reach(tmp_path, monkeypatch):
    """No data set is at hand or to be had."""

    def refuse(*_, **__):
        raise OSError("out of reach")

    for variable in ("DEPTHMIX_DATA", "DEPTHMIX_CACHE"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr("depthmix_replication.test_sets.read_source", refuse)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two toy experiments that share runs, worked through in this process."""
    root = tmp_path_factory.mktemp("reproduction")
    planned = plan(["fig6", "fig7"], scale="toy", workspace=root)
    for assignment in plan_assignments(planned.workspace, planned.runs, runs_per_job=99):
        work(assignment)
    return planned


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder with what Slurm would put on the path; `sbatch` keeps what it is given."""
    for name, text in (
        ("srun", "#!/bin/sh\n"),
        ("sbatch", f"#!/bin/sh\ncat $1 > {tmp_path}/submitted.sh\necho Submitted batch job 7\n"),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path
