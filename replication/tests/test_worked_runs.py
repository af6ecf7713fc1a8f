"""Runs that are worked through: interrupted, shared, damaged, and gone on with."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from depthmix_replication.experiment_files import merge
from depthmix_replication.gathering import gather
from depthmix_replication.launching import (
    Launcher,
    execute,
    launch,
    plan_assignments,
)
from depthmix_replication.planning import Selection, plan
from depthmix_replication.reproduce import reproduce
from depthmix_replication.test_sets import fetch_test_sets, list_test_sets
from depthmix_replication.trials import unique_runs
from depthmix_replication.worker import Assignment, share_batch, work
from depthmix_replication.workspace import Workspace, read_seconds
from expected import load_split_files, trials_of


class TestRuns:
    def test_finished_runs_are_not_planned_again(self, finished):
        assert plan_assignments(finished.workspace, finished.runs, runs_per_job=1) == []
        assert "0 of them to do" in str(finished)

    def test_a_deleted_run_is_rebuilt_with_the_same_numbers(self, finished):
        planned = finished
        key, (run, _) = next(iter(planned.runs.items()))
        experiment, trials = planned.trials["fig6"]
        (before,) = gather(experiment, "toy", trials, planned.workspace)
        shutil.rmtree(planned.workspace.run_folder(run))
        assignments = plan_assignments(planned.workspace, planned.runs, runs_per_job=99)
        assert [one.key for assignment in assignments for one, _ in assignment.runs] == [key]
        work(assignments[0])
        (after,) = gather(experiment, "toy", trials, planned.workspace)
        assert [row.scores for row in after.comparison.rows] == [
            row.scores for row in before.comparison.rows
        ]
        losses = [
            [entry["loss"] for entry in findings.rows[0].logs["arc_easy"][0] if "loss" in entry]
            for findings in (before, after)
        ]
        assert losses[0] == losses[1]
        assert len(losses[0]) == 2

    def test_an_interrupted_run_goes_on_from_its_checkpoint(self, finished, tmp_path):
        (_, trials) = finished.trials["fig6"]
        settings = merge(trials[0].run.settings, {"training": {"save_strategy": "steps"}})
        run = replace(trials[0].run, settings=merge(settings, {"training": {"save_steps": 1}}))
        workspace = Workspace(tmp_path)
        pair = (run, (trials[0].reading,))
        work(Assignment(root=tmp_path, runs=[pair]))
        whole = json.loads((workspace.run_folder(run) / "results.json").read_text())
        folder = workspace.run_folder(run)
        for name in ("results.json", "adapter_model.safetensors", "checkpoint-2"):
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert workspace.has_checkpoint(run)
        workspace.clear(run)
        assert folder.is_dir()
        work(Assignment(root=tmp_path, runs=[pair]))
        resumed = json.loads((folder / "results.json").read_text())
        assert [e["loss"] for e in resumed["log_history"] if "loss" in e] == [
            e["loss"] for e in whole["log_history"] if "loss" in e
        ]
        (earlier,) = json.loads((folder / "earlier_starts.json").read_text())
        assert earlier > 0
        seconds = resumed["metrics"]["total_seconds"]
        assert read_seconds(folder) == pytest.approx(seconds + earlier)

    def test_an_earlier_start_counts_up_to_its_checkpoint(self, finished, tmp_path):
        run, workspace = finished.trials["fig6"][1][0].run, Workspace(tmp_path)
        folder = workspace.run_folder(run)
        checkpoint = folder / "checkpoint-1"
        checkpoint.mkdir(parents=True)
        (folder / "results.json").write_text('{"metrics": {"total_seconds": 5.0}}')
        assert read_seconds(folder) == 5
        for began, ended in ((100, 160), (200, 160), (300, 340)):  # the second came to none
            for path, when in ((folder / "run_config.json", began), (checkpoint, ended)):
                path = path / "trainer_state.json" if path == checkpoint else path
                path.write_text('{"global_step": 1}')
                os.utime(path, (when, when))
            workspace.note_earlier_start(run)
        assert read_seconds(folder) == 5 + 60 + 0 + 40

    def test_what_was_interrupted_before_a_checkpoint_is_cleared(self, finished, tmp_path):
        _, trials = finished.trials["fig6"]
        workspace = Workspace(tmp_path)
        folder = workspace.run_folder(trials[0].run)
        folder.mkdir(parents=True)
        (folder / "run_config.json").write_text("{}")
        workspace.clear(trials[0].run)
        assert not folder.exists()
        finished.workspace.clear(trials[0].run)
        assert finished.workspace.is_trained(trials[0].run)

    def test_half_a_checkpoint_is_none(self, finished, tmp_path):
        _, trials = finished.trials["fig6"]
        run, workspace = trials[0].run, Workspace(tmp_path)
        whole, half = (workspace.run_folder(run) / f"checkpoint-{step}" for step in (1, 2))
        whole.mkdir(parents=True)
        half.mkdir()
        (whole / "trainer_state.json").write_text('{"global_step": 1}')
        (half / "adapter_model.safetensors").write_text("")
        workspace.clear(run)
        assert whole.is_dir()
        assert workspace.has_checkpoint(run)
        (whole / "trainer_state.json").write_text('{"global_step"')
        workspace.clear(run)
        assert not workspace.run_folder(run).exists()

    def test_a_batch_is_shared_by_processes(self):
        assert share_batch({"per_device_train_batch_size": 16}, 4) == {
            "per_device_train_batch_size": 4
        }
        assert share_batch({}, 1) == {}
        with pytest.raises(ValueError, match="must divide the batch of 16"):
            share_batch({"per_device_train_batch_size": 16}, 3)

    def test_a_run_without_all_test_sets_is_refused(self, finished, tmp_path, out_of_reach):
        run, readings = next(iter(finished.runs.values()))
        data = {"data": {"without": ["all"]}}
        run = replace(run, settings=merge(run.settings, data))
        assignment = Assignment(root=tmp_path / "work", runs=[(run, readings)])
        with pytest.raises(RuntimeError, match="1 of 1 runs have failed"):
            work(assignment)
        assert not Workspace(assignment.root).run_folder(run).exists()

    def test_test_sets_are_the_same_wherever_they_are_read_from(
        self, tmp_path, monkeypatch, out_of_reach
    ):
        with pytest.raises(FileNotFoundError, match=r"boolq.* are neither at hand nor to be had"):
            fetch_test_sets(["all"])
        fetch_test_sets(["mawps.jsonl"])
        assert list_test_sets(["mawps"]) == ["mawps"]
        elsewhere = list_test_sets(["all", "own.jsonl"])
        assert {"hellaswag", "mmlu_stem", "boolq", "own.jsonl"} <= set(elsewhere)
        assert not {"all", "hellaswag:further"} & set(elsewhere)  # the hub's test set holds it
        # Of HellaSwag, files are two samples; a folder with one of them lacks the other.
        test, further = (load_split_files("hellaswag", split) for split in ("test", "further"))
        for name in test:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        assert {*list_test_sets(["all"])} == {*elsewhere, "hellaswag:further"} - {"own.jsonl"}
        read = []
        monkeypatch.setattr(
            "depthmix_replication.test_sets.read_source", lambda name, *_, **__: read.append(name)
        )
        fetch_test_sets(["all"])
        assert "boolq" in read
        assert "hellaswag" not in read  # at hand
        assert "hellaswag:further" in read
        assert further

    def test_experiments_that_time_other_values_keep_their_files(self, finished, tmp_path):
        workspace = Workspace(tmp_path)
        run, (reading, *_) = next(iter(finished.runs.values()))
        first, other = (replace(reading, speed=speed) for speed in ((1, 2), (1, 3)))
        workspace.run_folder(run).mkdir(parents=True)
        for timed in (first, other):
            assert not workspace.is_timed(run, timed)
            workspace.speed_file(run, timed).write_text("[]")
        assert workspace.is_timed(run, first)
        assert workspace.is_timed(run, other)
        assert workspace.is_timed(run, reading)

    def test_toy_files_are_written_once(self, finished):
        (run, _) = next(iter(finished.runs.values()))
        placed = finished.workspace.place(run.settings)
        files = [Path(placed["data"]["train"]), Path(placed["model"]["name"]) / "config.json"]
        before = [path.stat().st_mtime_ns for path in files]
        finished.workspace.place(run.settings)
        assert [path.stat().st_mtime_ns for path in files] == before

    def test_a_run_belongs_to_one_process(self, finished, tmp_path):
        _, trials = finished.trials["fig6"]
        workspace = Workspace(tmp_path)
        with workspace.claim(trials[0].run) as first, workspace.claim(trials[0].run) as second:
            assert first
            assert not second
        with workspace.claim(trials[0].run) as again:
            assert again

    def test_a_second_worker_leaves_a_run_alone(self, finished, tmp_path):
        _, trials = finished.trials["fig6"]
        run, readings = trials[0].run, (trials[0].reading,)
        workspace = Workspace(tmp_path)
        with (
            workspace.claim(run, "worker"),
            pytest.raises(RuntimeError, match="by a worker whose owner has ended"),
        ):
            work(Assignment(root=tmp_path, runs=[(run, readings)]))
        assert not workspace.run_folder(run).exists()

    def test_a_worker_that_outlives_its_owner_keeps_its_run(self, finished, tmp_path, capsys):
        _, trials = finished.trials["fig6"]
        run, readings = trials[0].run, (trials[0].reading,)
        workspace = Workspace(tmp_path)
        with workspace.claim(run, "worker"):
            execute(Assignment(root=tmp_path, runs=[(run, readings)]), 1)
        assert "is being run by another process" in capsys.readouterr().out
        assert not workspace.run_folder(run).exists()

    def test_a_run_that_fails_does_not_take_the_others_with_it(self, finished, tmp_path):
        good, bad = list(finished.runs.values())[:2]
        broken = replace(bad[0], settings=merge(bad[0].settings, {"model": {"name": "./nowhere"}}))
        with pytest.raises(RuntimeError, match=f"1 of 2 runs have failed: .*{broken.key}"):
            work(Assignment(root=tmp_path, runs=[(broken, bad[1]), good]))
        assert Workspace(tmp_path).is_finished(*good)

    def test_an_assignment_is_read_as_it_was_written(self, finished, tmp_path):
        runs = list(finished.runs.values())
        assignment = Assignment(root=tmp_path, runs=runs, data_dir="x", judge={"model": "m"})
        read = Assignment.load(assignment.save(tmp_path / "a.json"))
        assert read.root == assignment.root
        assert [run.key for run, _ in read.runs] == [run.key for run, _ in runs]
        assert [readings for _, readings in read.runs] == [readings for _, readings in runs]

    def test_every_way_of_reading_a_run_is_kept(self):
        trials = trials_of("table4")
        runs = unique_runs(trials)
        assert len(runs) == 3  # seeds
        for _, readings in runs.values():
            assert [reading.top_k for reading in readings] == [6, 1, 2, 3, 4, 5]

    @pytest.mark.slow
    def test_processes_are_launched(self, tmp_path):
        planned = plan(["fig7"], scale="toy", workspace=tmp_path, selection=Selection(seeds=(0,)))
        pages = list(reproduce(planned, launcher=Launcher(), runs_per_job=9))
        assert len(pages) == 1
        assert pages[0].is_file()

    @pytest.mark.slow
    def test_a_failed_process_is_named_and_the_others_go_on(self, tmp_path):
        planned = plan(["fig7"], scale="toy", workspace=tmp_path, selection=Selection(seeds=(0,)))
        good, bad = planned.runs.values()
        broken = replace(bad[0], settings=merge(bad[0].settings, {"model": {"name": "./nowhere"}}))
        assignments = [Assignment(root=tmp_path, runs=[pair]) for pair in ((broken, bad[1]), good)]
        with pytest.raises(RuntimeError, match="1 of 2 processes have failed"):
            list(launch(assignments, Launcher(jobs=2)))
        assert planned.workspace.is_finished(*good)
