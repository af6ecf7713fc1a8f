"""What is refused before a run or an evaluation begins leaves no file behind."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
from trl import SFTConfig

import depthmix_cli
from checkpoints import save_checkpoint
from depthmix import load_run_config, train
from depthmix.options.types import list_types
from depthmix.training.config import RunConfig
from depthmix.training.numbers import COUNTS, NOT_NEGATIVE, POSITIVE, SHARES

CHOICE = {"prompt": "1 =", "choices": [" 1", " 2"], "answer": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused")
    save_checkpoint(folder / "base")
    records = [{"prompt": f"{n} =", "completion": f" {n}"} for n in range(4)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "items.jsonl").write_text(json.dumps(CHOICE))
    for name, item in (
        ("no_choices", {**CHOICE, "choices": []}),
        ("empty_choice", {**CHOICE, "choices": [" 1", ""]}),
        ("wrong_answer", {**CHOICE, "answer": 2}),
        ("no_answer", {"prompt": "1 =", "choices": [" 1"]}),
        ("record_without_a_form", {"text": "a"}),
    ):
        (folder / f"{name}.jsonl").write_text(f"{json.dumps(CHOICE)}\n{json.dumps(item)}")
    (folder / "broken.jsonl").write_text(f"{json.dumps(CHOICE)}\n{{")
    return folder


def sections(place, out):
    return {
        "model": {"name": str(place / "base")},
        "data": {"train": str(place / "train.jsonl")},
        "mode": {"late_layers": 2, "target_modules": ["q_proj"]},
        "training": {"output_dir": str(out), "max_steps": 1, "report_to": "none"},
        "evaluation": {"data": str(place / "items.jsonl"), "metric": "choices"},
    }


REFUSED = [
    *(("training", name, value) for name in COUNTS for value in (0, -1)),
    *(("training", name, value) for name in POSITIVE for value in (0, -1, "nan", "inf")),
    *(("training", "learning_rate", value) for value in (-1, "nan", "inf", "-inf", "fast")),
    ("training", "max_steps", 0),
    ("training", "max_steps", -2),
    ("training", "optim", "best"),
    ("training", "lr_scheduler_type", "steep"),
    ("training", "learning_rat", 1),
    ("evaluation", "batch_size", 0),
    ("evaluation", "num_items", 0),
    ("evaluation", "max_new_tokens", 0),
    ("evaluation", "metric", "best"),
    *(
        ("evaluation", "data", f"{name}.jsonl")
        for name in ("no_choices", "empty_choice", "wrong_answer", "no_answer", "broken", "none")
    ),
    ("data", "train", "broken.jsonl"),
    ("data", "train", "record_without_a_form.jsonl"),
    ("data", "train", "none.jsonl"),
    ("data", "limit", 0),
    ("data", "template", "odd"),
    ("model", "name", "./none"),
    ("model", "name", ""),
    ("model", "dtype", "int8"),
    ("mode", "late_layers", 9),
    ("mode", "top_k", 3),
    ("mode", "target_modules", "none_such"),
    ("mode", "target_modules", "['']"),
    ("mode", "layers_to_transform", 9),
    ("mode", "target_module", "q_proj"),
    ("mode", "r", 0),
    ("mode", "bias", "some"),
    ("mode", "lora_dropout", 2),
    ("method", None, "dora"),
]


@pytest.mark.parametrize(("section", "option", "value"), REFUSED)
def test_a_training_that_is_refused_leaves_nothing(place, tmp_path, section, option, value):
    given = sections(place, tmp_path / "out")
    if option is None:
        given[section] = value
    else:
        if str(value).endswith(".jsonl"):
            value = str(place / value)
        given[section][option] = value
    with pytest.raises((ValueError, OSError)) as refusal:
        train(load_run_config(None, given))
    assert "`" in str(refusal.value) or "ecord" in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_a_wrong_number_in_python_is_refused_too(place, tmp_path):
    config = load_run_config(None, sections(place, tmp_path / "out"))
    options = {field.name: getattr(config, field.name) for field in fields(RunConfig)}
    with pytest.raises(
        ValueError, match=r"`training.gradient_accumulation_steps` must be at least"
    ):
        RunConfig(**options | {"training": {"gradient_accumulation_steps": 0}})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_number_of_a_training_may_be_infinite(value):
    hints = list_types(SFTConfig)
    numbers = [field.name for field in fields(SFTConfig) if "float" in str(hints[field.name])]
    assert set(numbers) > {"learning_rate", "adam_epsilon", "max_grad_norm"}
    for name in numbers:
        with pytest.raises(ValueError, match=rf"`training.{name}` must be"):
            load_run_config(
                None, {"model": {"name": "m"}, "data": {"train": "t"}, "training": {name: value}}
            )


def test_the_bounds_are_those_of_options_that_there_are():
    known = {field.name: field.default for field in fields(SFTConfig)}
    for name in (*COUNTS, *POSITIVE, *NOT_NEGATIVE, *SHARES):
        assert name in known
        if isinstance(known[name], int | float):
            load_run_config(
                None,
                {
                    "model": {"name": "m"},
                    "data": {"train": "t"},
                    "training": {name: known[name]},
                },
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layer", "9"], "`layer` must be between 1 and 4"),
        (["--layer", "upper"], "`layer` must be"),
        (["--top-k", "9"], "needs an active mixture of depths, and the model has none; leave it"),
        (["--top-k", "0"], "`model.top_k` must be at least 1"),
        (["--batch-size", "0"], "`batch_size` must be at least 1"),
        (["--limit", "0"], "`limit` must be at least 1"),
        (["--records", "broken.jsonl"], "line 2 is no JSON"),
        (["--records", "no_choices.jsonl"], "`choices` must be a list of texts"),
        (["--records", "none.jsonl"], "`data` must be an existing file"),
    ],
)
def test_an_evaluation_that_is_refused_leaves_nothing(place, tmp_path, capsys, options, message):
    if options[0] == "--records":
        options = ["--records", str(place / options[1])]
    else:
        options = ["--records", str(place / "items.jsonl"), *options]
    command = ["evaluate", str(place / "base"), "--metric", "choices", *options]
    assert depthmix_cli.main([*command, "--output", str(tmp_path / "e")]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_task_without_data_leaves_nothing(place, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("DEPTHMIX_DATA", raising=False)

    def unreachable(*_args, **_options):
        raise OSError("offline")

    monkeypatch.setattr("pooch.retrieve", unreachable)
    monkeypatch.setattr("depthmix.data.source_files._find_cache", lambda: tmp_path / "cache")
    command = ["evaluate", str(place / "base"), "--tasks", "arc_easy"]
    assert depthmix_cli.main([*command, "--output", str(tmp_path / "e")]) == 1
    assert "not at hand" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
