"""Experiments as they are declared: the paper's, at each scale."""

import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

from depthmix_replication.experiment_files import (
    list_experiments,
    load_experiment,
    load_scale,
    load_subjects,
    merge,
)
from depthmix_replication.trials import expand
from expected import PAPER, load_split_files, trials_of


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
            assert subject.tasks or subject.reading["records"].startswith("made:")
