"""The fast preset: tuned as ever, then exits on the finished run, then a plan, in one command."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest

from calibrations import pretend_costs, pretend_speed, write_records
from checkpoints import save_checkpoint
from depthmix import MoDEConfig, load_model, load_run_config, train
from depthmix.adapters.exit_files import find_exits, read_exit_settings
from depthmix.data.selection import Selection
from depthmix.models.calibrating import calibrate
from depthmix.models.fast import read_plan
from depthmix.training import fast
from depthmix.training.fast import MOST_HELD_OUT, hold_out
from depthmix.training.folder import load_result
from depthmix_cli.app import run

TRAINING = {
    "max_steps": "2",
    "logging_steps": "1",
    "save_steps": "1",
    "report_to": "none",
    "seed": "0",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    pretend_costs(monkeypatch)
    monkeypatch.setattr(fast, "NUM_EXIT_STEPS", 2)
    monkeypatch.setattr(fast, "calibrate", partial(calibrate, max_new_tokens=4))


@pytest.fixture
def speeds(monkeypatch):
    return pretend_speed(monkeypatch, 1.4)


def configure(base, folder, *, number=24, **sections):
    records = write_records(folder / "sums.jsonl", number)
    data = {"train": str(records), **sections.pop("data", {})}
    training = {**TRAINING, "output_dir": str(folder / "run"), **sections.pop("training", {})}
    given = {"model": {"name": str(base)}, "data": data, "training": training, **sections}
    return load_run_config(None, {"preset": "fast", **given})


def test_settings_lie_below_what_is_said(base, tmp_path):
    config = configure(base, tmp_path, mode={"r": "4"}, training={"learning_rate": "1e-4"})
    assert config.method == "lora"
    assert (config.mode["r"], config.mode["lora_alpha"]) == (4, 32)
    assert config.mode["target_modules"] == "all-linear"
    assert config.training["learning_rate"] == 1e-4
    assert config.training["warmup_steps"] == 0.04
    assert config.training["per_device_train_batch_size"] == 16
    assert configure(base, tmp_path, method="mode").method == "mode"
    batch = {"per_device_train_batch_size": "4"}
    assert configure(base, tmp_path, training=batch).training["gradient_accumulation_steps"] == 4
    assert MoDEConfig.from_preset("fast").late_layers == 1


def test_one_call_tunes_puts_exits_on_and_calibrates(base, tmp_path, speeds, capsys):
    result = train(configure(base, tmp_path))
    folder = tmp_path / "run"
    assert result.data == {"given": 24, "dropped": 0, "used": 16, "held_out": 8}
    held_out = [json.loads(line) for line in (folder / "held-out.jsonl").read_text().splitlines()]
    assert [record["prompt"] for record in held_out] == [f"{n} + {n} =" for n in range(16, 24)]
    assert result.added is not None
    assert result.calibration is not None
    assert result.added.layers == (1, 2, 3)
    about = read_exit_settings(folder)["about"]
    assert about["data"]["limit"] == 16  # nothing that is held out is learnt
    assert about["data"]["eval"] == str(folder / "held-out.jsonl")
    plan = read_plan(find_exits(folder))
    assert plan == result.calibration.plan
    assert plan.exits_sha256 == read_exit_settings(folder)["sha256"]
    assert len(speeds) == 1
    adapted = load_model(folder).named_parameters()
    assert any(weight.any() for name, weight in adapted if "lora_B" in name)
    said = capsys.readouterr().err
    for sentence in (
        "8 records are held out, on which drafts are calibrated when the run is finished (",
        "16 are trained on.",
        "The run is finished. Now exits learn to draft for it, at 3 of its 4 layers and in 2 steps",
        "exits: step 1 of 2, mean loss",
        f"Now the run answers records of {folder / 'held-out.jsonl'}",
    ):
        assert sentence in said
    loaded = load_result(folder)
    assert loaded.data == result.data
    assert loaded.added is None


def test_the_commands_are_all_that_a_newcomer_types(base, tmp_path, speeds, capsys, monkeypatch):
    write_records(tmp_path / "sums.jsonl", 24)
    options = [f"--training.{name.replace('_', '-')}={value}" for name, value in TRAINING.items()]
    (tmp_path / "mine.toml").write_text(f'[model]\nname = "{base}"\n[data]\ntrain = "sums.jsonl"\n')
    monkeypatch.chdir(tmp_path)
    assert run(["train", "mine.toml", "--preset", "fast", *options]) == 0
    said = capsys.readouterr().out
    assert "With the model's own prediction, on" in said
    assert "Measured: 1.40 times as fast" in said
    assert "Saved in runs/mine; try it with `depthmix chat runs/mine --fast`." in said
    generation = ["--generation.max-new-tokens", "4"]
    assert run(["generate", "runs/mine", "3 + 3 =", "--fast", *generation]) == 0
    assert "tokens/s" in capsys.readouterr().err


@pytest.mark.slow
def test_records_of_ones_own_are_calibrated_on(base, tmp_path, speeds):
    other = tmp_path / "other.jsonl"
    other.write_text(
        "".join(json.dumps({"prompt": f"{n} -", "completion": f" {n}"}) + "\n" for n in range(200))
    )
    result = train(configure(base, tmp_path, data={"eval": str(other)}))
    assert result.data == {"given": 24, "dropped": 0, "used": 24, "held_out": MOST_HELD_OUT}
    assert "eval_loss" in result.metrics
    first = json.loads((tmp_path / "run" / "held-out.jsonl").read_text().splitlines()[0])
    assert first["prompt"] == "0 -"


@pytest.mark.slow
def test_an_interruption_while_calibrating_goes_on(base, tmp_path, speeds, monkeypatch):
    config = configure(base, tmp_path)

    def stop(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fast, "calibrate", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    folder = tmp_path / "run"
    assert load_result(folder).metrics
    assert read_plan(find_exits(folder)) is None
    adapter = (folder / "adapter_model.safetensors").read_bytes()
    result = train(config, resume=True)
    assert (folder / "adapter_model.safetensors").read_bytes() == adapter
    assert read_plan(find_exits(folder)) == result.calibration.plan
    plain = load_run_config(
        None,
        {
            "model": {"name": str(base)},
            "data": {"train": config.data.train},
            "method": "lora",
            "mode": config.mode,
            "training": config.training,
        },
    )
    with pytest.raises(ValueError, match="`preset` must be 'fast' to go on with the run"):
        train(plain, resume=True)
    with pytest.raises(FileExistsError, match=r"`training.output_dir` must be a new folder"):
        train(config)
    exits = read_exit_settings(folder)["sha256"]
    (folder / "held-out.jsonl").write_text("")
    again = train(configure(base, tmp_path, training={"learning_rate": "1e-2"}), overwrite=True)
    assert read_exit_settings(folder)["sha256"] != exits
    assert read_plan(find_exits(folder)) == again.calibration.plan
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("number", "data", "message"),
    [
        (15, {}, r"`preset=\"fast\"` needs at least 16 records in `data.train`, .* got 15"),
        (24, {"eval": "few"}, r"`data.eval` must hold at least 8 records .* got 3"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_before_training(
    base, tmp_path, number, data, message
):
    if data:
        records = [{"prompt": "a", "completion": " b"}] * 3
        path = tmp_path / "eval.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        data = {"eval": str(path)}
    with pytest.raises(ValueError, match=message):
        train(configure(base, tmp_path, number=number, data=data))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("number", "held"), [(16, 8), (100, 10), (1000, 100), (5000, 128)])
def test_a_tenth_is_held_out(number, held):
    records = [{"prompt": str(n)} for n in range(number)]
    numbers = tuple(range(1, number + 1))
    whole = Selection(records=records, numbers=numbers, num_given=number, num_dropped=0)
    learnt, kept = hold_out(whole)
    assert (len(learnt.records), len(kept.records)) == (number - held, held)
    assert learnt.records + kept.records == records
    assert learnt.numbers + kept.numbers == numbers
