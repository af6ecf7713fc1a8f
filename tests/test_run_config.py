import json
from pathlib import Path
from typing import Literal

import pytest
import yaml

from depthmix.adapters.config import MoDEConfig
from depthmix.files.settings import read_value
from depthmix.training.config import load_run_config, save_run_config

REQUIRED = {"model": {"name": "tiny"}, "data": {"train": "train.jsonl"}}

TOML = """
method = "mode"
[model]
name = "tiny"
[data]
train = "train.jsonl"
[mode]
late-layers = 2
target_modules = ["q_proj", "v_proj"]
[training]
learning_rate = 1e-4
max_steps = 7
"""

YAML = """
method: mode
model: {name: tiny}
data: {train: train.jsonl}
mode: {late-layers: 2, target_modules: "q_proj,v_proj"}
training: {learning_rate: 1e-4, max_steps: 7}
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


def test_toml_yaml_and_json_say_the_same(tmp_path):
    toml = load_run_config(write(tmp_path / "run.toml", TOML))
    assert isinstance(yaml.safe_load(YAML)["training"]["learning_rate"], str)  # YAML 1.1
    assert load_run_config(write(tmp_path / "run.yaml", YAML)) == toml
    text = json.dumps(yaml.safe_load(YAML))
    assert load_run_config(write(tmp_path / "run.json", text)) == toml
    assert toml.training == {"learning_rate": 1e-4, "max_steps": 7, "output_dir": "runs/run"}
    assert toml.mode == {"late_layers": 2, "target_modules": ["q_proj", "v_proj"]}


def test_command_line_wins_and_is_read_by_type(tmp_path):
    overrides = {
        "mode": {"late-layers": "[10,20,30]", "train-final-norm": "true", "top_k": "none"},
        "training": {
            "learning-rate": "3e-4",
            "lr_scheduler_kwargs": '{"a": 1}',
            "max-length": "none",
        },
        "model": {"dtype": "bfloat16"},
        "method": "lora",
        "preset": None,
    }
    config = load_run_config(write(tmp_path / "run.toml", TOML), overrides)
    assert config.mode["late_layers"] == [10, 20, 30]
    assert config.mode["train_final_norm"] is True
    assert config.mode["top_k"] is None
    assert config.training["learning_rate"] == 3e-4
    assert config.training["lr_scheduler_kwargs"] == {"a": 1}
    assert config.training["max_length"] is None
    assert (config.model.name, config.model.dtype, config.method) == ("tiny", "bfloat16", "lora")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("q_proj", ["q_proj"]),
        ("self_attn.q_proj", ["self_attn.q_proj"]),
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        ("[q_proj]", ["q_proj"]),
        ("all-linear", "all-linear"),
        (r".*\.q_proj", r".*\.q_proj"),
        ("(q|v)_proj", "(q|v)_proj"),
        (["q_proj"], ["q_proj"]),
    ],
)
@pytest.mark.parametrize(
    ("section", "option"),
    [("mode", "target-modules"), ("mode", "exclude_modules"), ("training", "optim-target-modules")],
)
def test_one_name_of_a_part_is_a_list(section, option, text, expected, tmp_path):
    config = load_run_config(None, {**REQUIRED, section: {option: text}})
    assert getattr(config, section)[option.replace("-", "_")] == expected
    assert load_run_config(save_run_config(config, tmp_path)) == config


def test_paper_preset_lies_below_what_is_said():
    config = load_run_config(
        None, {**REQUIRED, "preset": "paper", "mode": {"r": "8"}, "training": {"max_steps": "3"}}
    )
    assert config.mode["r"] == 8
    assert config.mode["lora_alpha"] == 64
    assert config.training["max_steps"] == 3
    assert config.training["learning_rate"] == 3e-4
    assert config.training["output_dir"] == "runs/mode"
    assert MoDEConfig(**config.mode).late_layers == 3


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_paper_preset_keeps_its_effective_batch(batch):
    training = {"per_device_train_batch_size": batch}
    config = load_run_config(None, {**REQUIRED, "preset": "paper", "training": training})
    assert config.training["gradient_accumulation_steps"] * batch == 16


def test_paper_preset_refuses_a_batch_that_does_not_divide():
    training = {"per_device_train_batch_size": "3"}
    with pytest.raises(ValueError, match=r"must multiply to the preset's batch of 16"):
        load_run_config(None, {**REQUIRED, "preset": "paper", "training": training})


@pytest.mark.parametrize("preset", [None, "paper"])
def test_saved_settings_load_again(tmp_path, preset):
    overrides = {
        **REQUIRED,
        "preset": preset,
        "mode": {"late_layers": "2"},
        "training": {"lr_scheduler_type": "cosine", "output_dir": str(tmp_path / "out")},
        "evaluation": {"data": "test.jsonl", "metric": "choices", "num_items": "5"},
    }
    config = load_run_config(None, overrides)
    path = save_run_config(config, tmp_path / "out")
    assert load_run_config(path) == config


def test_a_secret_is_not_saved(tmp_path):
    config = load_run_config(None, {**REQUIRED, "training": {"hub_token": "hf_secret"}})
    assert config.training["hub_token"] == "hf_secret"
    path = save_run_config(config, tmp_path / "out")
    assert "hf_secret" not in path.read_text()
    assert load_run_config(path).training["output_dir"] == config.training["output_dir"]


def test_paths_are_looked_up_beside_the_file_first(tmp_path, monkeypatch):
    folder, elsewhere = tmp_path / "configs", tmp_path / "elsewhere"
    folder.mkdir(), elsewhere.mkdir()
    (folder / "train.jsonl").touch()
    monkeypatch.chdir(elsewhere)
    path = write(
        folder / "run.toml", TOML + '[evaluation]\ndata = "test.jsonl"\nmetric = "choices"'
    )
    config = load_run_config(path)
    assert Path(config.data.train) == folder / "train.jsonl"
    assert config.evaluation.data == "test.jsonl"
    assert load_run_config(path, {"data": {"train": "train.jsonl"}}).data.train == "train.jsonl"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"training": {"learning_rat": "1"}}, "`training.learning_rat` is not .* `learning_rate`"),
        ({"mode": {"late_layer": "1"}}, "`mode.late_layer` is not an option of MoDEConfig"),
        ({"model": {"nam": "x"}}, "`model.nam` is not an option of ModelSpec; did you mean"),
        ({"mdoe": {"r": "1"}}, "`mdoe` is not a section of a run; did you mean `mode`"),
        ({"mode": "late"}, "`mode` must be a section that holds options, got 'late'"),
        ({"method": "dora"}, "`method` must be 'mode' or 'lora', got 'dora'"),
        ({"training": {"learning_rate": "fast"}}, "`training.learning_rate` must be float, got 'f"),
        (
            {"mode": {"late_layers": True}},
            "`mode.late_layers` must be int or list.int. or .auto., got",
        ),
        ({"mode": {"r": "2.5"}}, "`mode.r` must be int, got '2.5'"),
        ({"mode": {"task_loss": "last"}}, "`mode.task_loss` must be 'ensemble' or 'lay.* or int, "),
    ],
)
def test_wrong_settings_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_run_config(None, {**REQUIRED, **overrides})


@pytest.mark.parametrize(("section", "option"), [("model", "name"), ("data", "train")])
def test_missing_settings_are_named(section, option):
    with pytest.raises(
        ValueError,
        match=f"`{section}.{option}` is missing; .* section `{section}` of the file, or pass it",
    ):
        load_run_config(None, {k: v for k, v in REQUIRED.items() if k != section})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.toml", "model = [", "is damaged"),
        ("run.yaml", "a: [", "is damaged"),
        ("run.json", "[1]", "must hold named sections, got list"),
        ("run.ini", "", "TOML, YAML or JSON file"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        load_run_config(write(tmp_path / name, text))
    with pytest.raises(FileNotFoundError, match=r"must be an existing file"):
        load_run_config(tmp_path / "missing.toml")


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        ("q_proj", list[str] | str | None, "q_proj"),
        ("q_proj, v_proj", list[str] | str | None, ["q_proj", "v_proj"]),
        (r".*\.(q|v){1,2}_proj", list[str] | str | None, r".*\.(q|v){1,2}_proj"),
        ("[qk]_proj", list[str] | str | None, "[qk]_proj"),
        ("none", list[str] | str | None, None),
        ("false", bool | str, False),
        ("auto", bool | str, "auto"),
        ("3", int | list[int], 3),
        ("29", Literal["ensemble", "layers"] | int, 29),
        ("layers", Literal["ensemble", "layers"] | int, "layers"),
    ],
)
def test_text_is_read_by_type(value, hint, expected):
    assert read_value(value, hint) == expected


def test_none_stays_text_where_it_is_the_default():
    assert (
        load_run_config(None, {**REQUIRED, "training": {"report_to": "none"}}).training["report_to"]
        == "none"
    )
