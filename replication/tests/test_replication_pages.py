"""Pages: tables, figures and numbers of what was run, and what departs from the paper."""

import csv
import json
from dataclasses import replace

import pytest
import torch

from depthmix.comparison.comparison import compare
from depthmix.evaluation.generation_speed import GenerationSpeed
from depthmix.evaluation.reading import load_evaluation
from depthmix.evaluation.result import TaskResult
from depthmix.statistics.intervals import holm
from depthmix_replication.drawings import make_trade_offs
from depthmix_replication.gathering import gather, list_logs, make_row
from depthmix_replication.pages import write_findings
from depthmix_replication.planning import Selection, plan
from depthmix_replication.raw_numbers import write_scores, write_training
from depthmix_replication.reproduce import reproduce
from evaluation_folder import write_evaluation


class TestPages:
    def test_a_page_holds_table_figure_and_numbers(self, finished, tmp_path):
        pages = list(reproduce(finished, results=tmp_path))
        assert [page.parent.name for page in pages] == ["fig6", "fig7"]
        for page in pages:
            text = page.read_text("utf-8")
            assert f"depthmix reproduce {page.parent.name} --scale toy --seeds 0,1" in text
            assert "![Figure" in text
            assert "trained parameters" in text
            assert (page.parent / "findings.svg").read_text("utf-8").lstrip().startswith("<")
            numbers = json.loads((page.parent / "findings.json").read_text("utf-8"))
            keys = {key for row in numbers["rows"] for key in row["runs"]}
            assert keys <= set(finished.runs)
            method = numbers["comparison"]["methods"][0]
            assert set(method["folders"]) == set(numbers["rows"][0]["runs"])
            for name in ("findings.json", "findings.training.csv", "findings.scores.csv"):
                assert f"({name})" in text
            assert "Tuned on ARC-Easy (" in text
            assert f" {torch.__version__}" in text

    def test_logs_and_scores_stand_beside_the_page(self, finished, tmp_path):
        experiment, trials = finished.trials["fig6"]
        (found,) = gather(experiment, "toy", trials, finished.workspace)
        write_findings([found], tmp_path)
        with (tmp_path / "findings.training.csv").open(encoding="utf-8") as file:
            steps = list(csv.DictReader(file))
        assert {step["run"] for step in steps} == {key for row in found.rows for key in row.runs}
        assert len(steps) == 2 * len({trial.run.key for trial in trials})
        assert "memory_gib" not in steps[0]
        for row in found.rows:
            for seed, log in zip(row.seeds, row.logs["arc_easy"], strict=True):
                own = [s for s in steps if (s["method"], s["seed"]) == (row.label, str(seed))]
                assert [int(step["step"]) for step in own] == [1, 2]
                assert {step["run"] for step in own} <= set(row.runs)
                for step, entry in zip(own, log, strict=False):
                    assert float(step["loss"]) == pytest.approx(entry["loss"], rel=1e-5)
        with (tmp_path / "findings.scores.csv").open(encoding="utf-8") as file:
            items = list(csv.DictReader(file))
        (task,) = found.comparison.tasks
        assert len({item["item"] for item in items}) == len(items) == task.num_items
        for row, score in zip(found.rows, task.scores, strict=True):
            for seed, expected in zip(row.seeds, score.seed_means, strict=True):
                column = [float(item[f"{row.label}, seed {seed}"]) for item in items]
                assert sum(column) / len(column) == pytest.approx(expected)

    def test_data_sets_of_other_sizes_are_told_apart(self, finished, tmp_path):
        experiment, trials = finished.trials["fig6"]
        (found,) = gather(experiment, "toy", trials, finished.workspace)
        sizes = {
            "records": {"arc_easy": 9, "boolq": 9, "truthfulqa": 8},
            "steps": {"arc_easy": 3, "boolq": 3, "truthfulqa": 2},
        }
        rows = tuple(replace(row, **sizes) for row in found.rows)
        subjects = ("arc_easy", "boolq", "truthfulqa")
        text = write_findings([replace(found, rows=rows, subjects=subjects)], tmp_path).read_text()
        assert "Tuned on ARC-Easy, BoolQ (9 records, 3 steps each), Alpaca" in text
        assert "Alpaca for TruthfulQA (8 records, 2 steps); 6 training runs" in text
        assert "depart from the paper's" not in text  # invented records
        found = replace(found, scale="small", rows=rows, subjects=("truthfulqa", "mmlu_stem"))
        text = write_findings([found], tmp_path).read_text()
        assert text.count("Alpaca is 4,900 records") == 1
        assert "; TruthfulQA is all 817 questions" in text

    def test_a_run_that_rows_and_subjects_share_is_logged_once(self, finished, tmp_path):
        experiment, trials = finished.trials["fig6"]
        shared = [replace(trial, subject="boolq", method="another") for trial in trials]
        rows = [trial for trial in trials if trial.method == trials[0].method]
        (found,) = gather(experiment, "toy", rows, finished.workspace)
        write_training(tmp_path / "one.csv", found.logs)
        both = [*rows, *(s for s in shared if s.run.key in {r.run.key for r in rows})]
        logs = list(list_logs(both, finished.workspace))
        assert len(logs) == len(found.logs) == 2
        assert logs[0].methods == (trials[0].method, "another")
        assert logs[0].subjects == ("arc_easy", "boolq")
        assert make_row(
            [*rows, *(replace(r, subject="boolq") for r in rows)], finished.workspace
        ).records.keys() == {"arc_easy", "boolq"}
        # One that logs less, and later, leaves cells empty.
        less = replace(logs[1], entries=({"step": 7, "loss": 1.0}, {"train_loss": 1.0}))
        write_training(tmp_path / "two.csv", [logs[0], less])
        with (tmp_path / "two.csv").open(encoding="utf-8") as file:
            *_, last = csv.DictReader(file)
        assert (last["step"], last["loss"], last["grad_norm"]) == ("7", "1", "")
        assert last["method"] == f"{trials[0].method}; another"

    def test_items_without_a_rating_are_left_empty(self, tmp_path):
        rated, unrated = ("chat", "a" * 64, 0), ("chat", "a" * 64, 1)
        task = TaskResult(metric="score,none", scores={rated: 0.7}, unrated=frozenset([unrated]))
        other = TaskResult(metric="acc,none", scores={("more", "b" * 64, 0): 1.0})
        one = load_evaluation(write_evaluation(tmp_path / "e", {"arc": [1]}, seed=3))
        tuned, more = (
            replace(one, adapter="x", tasks={"chat": task}),
            replace(one, adapter="y", tasks={"more": other}),
        )
        before = replace(one, adapter=None, tasks={"chat": task, "more": other})
        write_scores(tmp_path / "scores.csv", {"MoDE": [tuned, more], "pretrained": [before]})
        assert (tmp_path / "scores.csv").read_text() == (
            'task,item,"MoDE, seed 3",pretrained\n'
            "chat,aaaaaaaaaaaa,0.7,0.7\nchat,aaaaaaaaaaaa-1,,\nmore,bbbbbbbbbbbb,1,1\n"
        )

    def test_speed_is_drawn_and_laid_out_for_what_was_timed(self, finished, tmp_path):
        experiment, trials = finished.trials["fig6"]
        experiment = replace(experiment, shows="speed", reading={"speed": [1]})
        (found,) = gather(experiment, "toy", trials, finished.workspace)
        speeds = [
            GenerationSpeed(top_k=1, tokens_per_second=t, layers_per_token=7.5, speedup=t / 10)
            for t in (11.0, 14.0)
        ]
        first, *others = found.rows
        found = replace(found, rows=(replace(first, speeds=tuple(speeds)), *others))
        text = write_findings([found], tmp_path).read_text("utf-8")
        cells = ("7.50 (7.50 to 7.50)", "12.50 (11.00 to 14.00)", "1.25 (1.10 to 1.40)")
        assert rf"| LoRA\_¬K + MoDE | {' | '.join(cells)} |" in text
        assert text.count(" to 14.00)") == 1
        (one,) = make_trade_offs(found, found.comparison.rows[-1])
        assert one.speedups == (1.1, 1.4)

    def test_a_page_says_what_departs_from_the_paper(self, finished, tmp_path):
        (page, _) = reproduce(finished, results=tmp_path)
        text = page.read_text("utf-8")
        assert "| run.training.max\\_steps | 2 | -1 |" in text
        assert "| subjects | arc\\_easy | arc\\_easy, arc\\_challenge, boolq, openbookqa |" in text

    def test_a_page_that_shows_more_is_kept(self, finished, tmp_path):
        *_, page = reproduce(finished, results=tmp_path)
        before = page.read_text("utf-8")
        fewer = plan(
            ["fig7"],
            scale="toy",
            workspace=finished.workspace.root,
            selection=Selection(seeds=(1,)),
        )
        with pytest.raises(FileExistsError, match="on arc_easy with seed 0; ask for these"):
            list(reproduce(fewer, results=tmp_path))
        assert page.read_text("utf-8") == before
        assert list(reproduce(fewer, results=tmp_path / "other"))
        (again,) = reproduce(
            plan(["fig7"], scale="toy", workspace=finished.workspace.root),
            results=tmp_path / "other",
        )
        assert again.read_text("utf-8") == before

    def test_a_share_of_the_gap_is_shown(self, finished, tmp_path):
        experiment, trials = finished.trials["fig6"]
        first, *others = experiment.methods
        names = [method.name for method in others]
        experiment = replace(experiment, methods=(replace(first, recovers=tuple(names)), *others))
        (found,) = gather(experiment, "toy", trials, finished.workspace)
        (one,) = found.comparison.recoveries
        assert (one.gap.start, one.gap.goal, one.gap.method) == (*names, first.name)
        text = write_findings([found], tmp_path).read_text("utf-8")
        assert r"| LoRA\_¬K + MoDE | without N\_i to without L\_distill |" in text
        saved = json.loads((tmp_path / "findings.json").read_text("utf-8"))
        assert saved["comparison"]["recoveries"][0]["width"] == one.width

    def test_methods_that_disagree_stand_beside_seeds_that_do(self, finished, tmp_path):
        experiment, trials = finished.trials["fig6"]
        experiment = replace(experiment, shows="overlaps")
        (found,) = gather(experiment, "toy", trials, finished.workspace)
        same, other, *_ = found.comparison.tasks[0].disagreements
        assert same.methods == ("LoRA_¬K + MoDE", "LoRA_¬K + MoDE")
        assert other.methods != same.methods
        text = write_findings([found], tmp_path).read_text("utf-8")
        assert rf"| LoRA\_¬K + MoDE | another seed | {100 * same.share:.1f} | 1 |" in text

    def test_methods_stand_beside_others_than_the_baseline(self, finished, tmp_path):
        experiment, trials = finished.trials["fig6"]
        *first, last = experiment.methods
        experiment = replace(experiment, methods=(*first, replace(last, beside=("without N_i",))))
        (found,) = gather(experiment, "toy", trials, finished.workspace)
        (contrast,) = found.contrasts  # one task, so that there is no average
        folders = {method.label: method.folders for method in found.comparison.methods}
        runs = [
            f"{label}={','.join(map(str, folders[label]))}"
            for label in ("without N_i", "without L_distill")
        ]
        assert contrast.difference == compare(runs).rows[-1].scores[1].difference
        assert contrast.adjusted_p_value == contrast.difference.p_value  # the only one
        text = write_findings([found], tmp_path).read_text("utf-8")
        assert r"| without L\_distill | without N\_i |" in text

    def test_the_command_names_another_model(self, finished):
        experiment, trials = finished.trials["fig6"]
        (found,) = gather(experiment, "toy", trials, finished.workspace)
        page = write_findings(
            [replace(found, scale="small", model="other")], finished.workspace.root
        )
        assert "--scale small --model other --seeds 0,1" in page.read_text("utf-8")

    def test_methods_stand_beside_others_task_by_task(self, finished, monkeypatch):
        experiment, trials = finished.trials["fig6"]
        first, *others = experiment.methods
        methods = (first, *(replace(other, beside=(first.name,)) for other in others))
        experiment = replace(experiment, methods=methods)

        def with_second(one, label):
            task = one.tasks["records"]
            scores = dict.fromkeys(task.scores, float(label != first.name))
            return replace(one, tasks={**one.tasks, "second": replace(task, scores=scores)})

        known = gather(experiment, "toy", trials, finished.workspace)[0].outcomes
        outcomes = {
            label: [with_second(one, label) for one in runs] for label, runs in known.items()
        }
        monkeypatch.setattr("depthmix_replication.gathering.read_methods", lambda _: outcomes)
        (found,) = gather(experiment, "toy", trials, finished.workspace)
        assert [one.task for one in found.contrasts] == ["records", "second", "average"] * 2
        for own, second, average in (found.contrasts[:3], found.contrasts[3:]):
            assert own.difference.estimate == 0
            assert second.difference.estimate == 1
            assert average.difference.estimate == pytest.approx(0.5)
        p_values = [one.difference.p_value for one in found.contrasts]
        assert tuple(one.adjusted_p_value for one in found.contrasts) == holm(p_values)
        assert max(p_values) > min(p_values)

    def test_the_command_names_the_judge(self, finished):
        experiment, trials = finished.trials["fig6"]
        (found,) = gather(experiment, "toy", trials, finished.workspace)
        judged = replace(found, judge={"model": "m", "temperature": 0.0})
        page = write_findings([judged], finished.workspace.root)
        assert "--judge.model m" in page.read_text("utf-8")

    def test_the_same_runs_give_the_same_files(self, finished, tmp_path):
        first, second = (list(reproduce(finished, results=tmp_path / name)) for name in "ab")
        for one, other in zip(first, second, strict=True):
            for path in one.parent.iterdir():
                assert path.read_bytes() == (other.parent / path.name).read_bytes()
