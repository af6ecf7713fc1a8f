"""Where runs are worked through: here, on several devices, on a cluster."""

import pytest
from submitit.helpers import DelayedSubmission

from depthmix_replication.launching import (
    Launcher,
    execute,
    launch,
    share_devices,
)
from depthmix_replication.worker import Assignment


class TestLaunching:
    def test_a_cluster_gets_a_day_and_one_gpu_for_each_process(self, cluster):
        options = {"slurm-partition": "gpu"}
        launcher = Launcher(kind="slurm", num_processes=2, options=options)
        assert list(launch([Assignment(root=cluster, runs=[])], launcher)) == []
        script = (cluster / "submitted.sh").read_text()
        for line in ("--time=1440", "--gpus-per-node=2", "--partition=gpu"):
            assert f"#SBATCH {line}\n" in script

    def test_an_interrupted_job_is_queued_again(self, finished, tmp_path, monkeypatch, cluster):
        calls = []
        monkeypatch.setattr(
            "depthmix_replication.launching.subprocess.run",
            lambda command, **options: calls.append(command),
        )
        assignment = Assignment(root=tmp_path, runs=list(finished.runs.values())[:1])
        assert list(launch([assignment], Launcher(kind="slurm"))) == []
        (submitted,) = (tmp_path / "logs").glob("*_submitted.pkl")
        again = DelayedSubmission.load(submitted)._checkpoint_function()
        again.dump(tmp_path / "again.pkl")
        assert calls == []
        DelayedSubmission.load(tmp_path / "again.pkl").result()
        (path,) = (tmp_path / "assignments").iterdir()
        assert calls[0][-1] == str(path)
        assert [run.key for run, _ in Assignment.load(path).runs] == [assignment.runs[0][0].key]

    def test_a_refused_job_says_why(self, cluster):
        (cluster / "sbatch").write_text("#!/bin/sh\necho no such resource >&2\nexit 1\n")
        with pytest.raises(
            RuntimeError, match=r"saying 'no such resource'.*slurm.gpus_per_node=0`"
        ):
            list(launch([Assignment(root=cluster, runs=[])], Launcher(kind="slurm")))

    def test_options_that_submitit_does_not_know_are_refused(self, cluster):
        for options in ({"slurm-partitoin": "gpu"}, {"queue": "gpu"}, {"mem-gb": "much"}):
            with pytest.raises(ValueError, match="`slurm` must hold parameters"):
                list(
                    launch(
                        [Assignment(root=cluster, runs=[])],
                        Launcher(kind="slurm", options=options),
                    )
                )

    def test_what_would_be_ignored_is_refused(self):
        with pytest.raises(ValueError, match="is for `launcher=slurm`"):
            Launcher(options={"slurm-partition": "gpu"})
        with pytest.raises(ValueError, match="`jobs` is for this machine"):
            Launcher(kind="slurm", jobs=2)

    def test_jobs_share_the_gpus_of_a_machine(self, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,GPU-a")
        assert [share_devices(slot, 1) for slot in range(4)] == [["4"], ["5"], ["GPU-a"], ["4"]]
        assert share_devices(0, 2) == ["4", "5"]
        with pytest.raises(ValueError, match="`num_processes` must be at most the 3 GPUs"):
            share_devices(0, 4)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert share_devices(3, 1) == []

    def test_a_run_sees_its_own_gpus_alone(self, finished, tmp_path, monkeypatch):
        calls = []
        monkeypatch.setattr(
            "depthmix_replication.launching.subprocess.run",
            lambda command, **options: calls.append((command, options["env"])),
        )
        # As submitit leaves it for a local job.
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assignment = Assignment(root=tmp_path, runs=list(finished.runs.values())[:1])
        execute(assignment, 2, ["1", "3"])
        execute(assignment, 1, [])
        commands, environments = zip(*calls, strict=True)
        assert [e["CUDA_VISIBLE_DEVICES"] for e in environments] == ["1,3", ""]
        assert "--multi_gpu" in commands[0]
        assert commands[0][commands[0].index("--main_process_port") + 1] == "0"
        assert "--multi_gpu" not in commands[1]
