"""What is planned: which experiments, which of their runs are left, and how long they take."""

from dataclasses import replace

import pytest

from depthmix_replication.estimate import count_reading, count_training, estimate
from depthmix_replication.launching import (
    Launcher,
    plan_assignments,
)
from depthmix_replication.planning import Selection, plan
from depthmix_replication.reproduce import reproduce
from depthmix_replication.runs import Reading
from depthmix_replication.workspace import Workspace


class TestPlanning:
    def test_an_estimate_writes_no_second_toy_model(self, finished):
        before = sorted(finished.workspace.root.iterdir())
        (run, readings) = next(iter(finished.runs.values()))
        found = estimate(finished.workspace, [(run, readings)])
        assert found.seconds > 0
        assert str(found) == "by the finished runs of the same model here"
        assert sorted(finished.workspace.root.iterdir()) == before

    def test_an_estimate_says_what_it_rests_on(self, finished, tmp_path):
        found = estimate(Workspace(tmp_path), list(finished.runs.values()))
        assert str(found) == (
            "by the speed of a matrix product here, since no run of toy is finished"
        )
        planned = plan(["fig7"], scale="toy", workspace=tmp_path)
        assert f"one after the other ({found})." in str(planned)

    def test_an_estimate_knows_how_many_items_a_benchmark_has(self, finished):
        run = next(iter(finished.runs.values()))[0]

        def cost(*tasks, **options):
            return count_reading(run, Reading(tasks=tasks, **options))

        assert cost("mmlu_stem", limit=10) == 18 * cost("arc_easy", limit=10)  # of each part
        assert cost("mmlu_stem", limit=10, num_fewshot=5) == 6 * cost("mmlu_stem", limit=10)
        assert cost("arc_easy", "boolq", limit=7) == 14 / 817 * cost("truthfulqa")
        assert cost(limit=None) == 12 / 817 * cost("truthfulqa")  # invented records

    def test_an_estimate_knows_how_many_records_there_are(self, finished):
        run = next(iter(finished.runs.values()))[0]

        def cost(name, **options):
            training = {"num_train_epochs": 1, "max_steps": -1}
            sections = {"data": {"train": name, **options}, "training": training}
            return count_training(replace(run, settings=run.settings | sections))

        assert (
            cost("arc_challenge") == cost("arc_challenge", limit=2000) == 1119 * cost("x", limit=1)
        )
        assert cost("arc_challenge", limit=7) == 7 * cost("x", limit=1)
        assert cost("my/own") == 5000 * cost("x", limit=1)

    def test_what_is_complete_is_shown_where_a_run_has_failed(
        self, finished, tmp_path, monkeypatch
    ):
        def fail(*_):
            raise RuntimeError("1 of 2 processes have failed")
            yield

        monkeypatch.setattr("depthmix_replication.reproduce.launch", fail)
        pages = reproduce(finished, results=tmp_path)
        shown = [next(pages) for _ in finished.trials]
        assert all(page.is_file() for page in shown)
        with pytest.raises(RuntimeError, match="1 of 2 processes"):
            next(pages)

    def test_an_experiment_of_other_subjects_is_left_out_with_a_word(self, tmp_path, capsys):
        chosen = Selection(subjects=("mawps",))
        planned = plan(["fig8", "fig7"], scale="paper", workspace=tmp_path, selection=chosen)
        assert list(planned.trials) == ["fig8"]
        assert "fig7 is left out, since it has other subjects: arc_easy" in capsys.readouterr().err

    def test_what_does_not_fit_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="`runs_per_job` must be at least 1, got 0"):
            plan_assignments(Workspace(tmp_path), {}, runs_per_job=0)
        path = tmp_path / "half.toml"
        path.write_text(
            'title = "x"\nclaims = []\nshows = "scores"\nsubjects = ["arc_easy"]\n'
            "[[methods]]\nname = 'a'\n[scales.paper]\nsubject = ['boolq']"
        )
        with pytest.raises(ValueError, match="did you mean `subjects`"):
            plan([str(path)], workspace=tmp_path)
        with pytest.raises(ValueError, match="`model` must be left out"):
            plan(["fig7"], scale="toy", workspace=tmp_path, selection=Selection(models=("a",)))
        with pytest.raises(ValueError, match="`subjects` must be known ones"):
            plan(["fig7"], workspace=tmp_path, selection=Selection(subjects=("arc_easy", "chess")))
        with pytest.raises(ValueError, match="whose subjects are asked for"):
            plan(["fig7"], workspace=tmp_path, selection=Selection(subjects=("boolq",)))
        with pytest.raises(ValueError, match="`jobs` must be at least 1"):
            Launcher(jobs=0)
        own = 'title = "x"\nclaims = []\nshows = "scores"\nsubjects = ["arc_easy"]\n'
        paths = [tmp_path / folder / "own.toml" for folder in "ab"]
        for path in paths:
            path.parent.mkdir()
            path.write_text(own + "[[methods]]\nname = 'a'")
        with pytest.raises(ValueError, match="`experiments` must have names of their own"):
            plan(list(map(str, paths)), scale="toy", workspace=tmp_path)

    def test_a_judge_is_asked_for_before_anything_runs(self, tmp_path, monkeypatch):
        monkeypatch.setattr("depthmix_replication.planning.count_layers", lambda _: 30)
        planned = plan(["table3"], workspace=tmp_path)
        with pytest.raises(ValueError, match="`judge` must be given for table3"):
            list(reproduce(planned))
        assert not any(tmp_path.iterdir())

    def test_all_test_sets_are_asked_for_before_anything_runs(
        self, tmp_path, monkeypatch, out_of_reach
    ):
        monkeypatch.setattr("depthmix_replication.planning.count_layers", lambda _: 30)
        planned = plan(["fig7"], workspace=tmp_path / "work")
        for launcher in (None, Launcher(jobs=2)):
            with pytest.raises(FileNotFoundError, match=r"boolq.* are neither at hand"):
                list(reproduce(planned, launcher=launcher))
        assert not any(tmp_path.iterdir())
        # A cluster's nodes may have what this machine lacks, and a trained run needs none.
        launched = []
        monkeypatch.setattr(
            "depthmix_replication.reproduce.launch",
            lambda assignments, launcher: launched.append(launcher.kind) or iter(()),
        )
        assert not list(reproduce(planned, launcher=Launcher(kind="slurm")))
        for run, _ in planned.runs.values():
            folder = planned.workspace.run_folder(run)
            folder.mkdir(parents=True)
            (folder / "results.json").write_text("{}")
        assert not list(reproduce(planned))
        assert launched == ["slurm", "local"]

    def test_all_leaves_out_what_needs_a_judge(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr("depthmix_replication.planning.count_layers", lambda _: 30)
        monkeypatch.setattr(
            "depthmix_replication.planning.list_experiments", lambda: ["table3", "fig7"]
        )
        assert list(plan(["all"], workspace=tmp_path).trials) == ["fig7"]
        assert "table3 is left out, since a judge" in capsys.readouterr().err
        assert list(plan(["all"], workspace=tmp_path, judge={"model": "m"}).trials) == [
            "table3",
            "fig7",
        ]
        assert list(plan(["all"], scale="toy", workspace=tmp_path).trials) == ["table3", "fig7"]
        with pytest.raises(ValueError, match="`judge` must be given for table3"):
            list(reproduce(plan(["all", "table3"], workspace=tmp_path)))
