"""Keys of runs: what two experiments share, and what makes a run another one."""

import json
from dataclasses import replace

import torch
from safetensors.torch import save_file

from depthmix_replication.experiment import Experiment, Method
from depthmix_replication.experiment_files import merge
from depthmix_replication.runs import Reading, Run
from depthmix_replication.trials import expand
from expected import trials_of


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
