"""What a run leaves in its folder can be read again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import depthmix_cli
from depthmix import TrainResult
from depthmix.adapters.ledger import Ledger
from depthmix.evaluation.reading import load_evaluation
from depthmix.libraries.releases import CHECKPOINTING
from depthmix.training.config import load_run_config, save_run_config
from depthmix.training.folder import load_result, save_result
from depthmix.training.start import check_resumed
from evaluation_folder import write_evaluation


@pytest.fixture
def result(tmp_path):
    places = {"before": tmp_path / "pretrained" / "evaluation" / "training"}
    places["after"] = tmp_path / "evaluation" / "training"
    for moment, scores in (("before", [1, 0]), ("after", [1, 1])):
        write_evaluation(places[moment], {"records": scores}, method=moment)
    return TrainResult(
        output_dir=tmp_path,
        metrics={"train_runtime": 1.5, "total_seconds": 2.0},
        log_history=[{"step": 1, "loss": 0.1 + 0.2, "routing_weight/layer_9": 1 / 3}],
        ledger=Ledger(
            lora_below=5, lora_late=0, norms=2, router=3, other=0, total=10, model=1000
        ),
        data={"given": 3, "dropped": 1, "used": 2},
        before=load_evaluation(places["before"]),
        after=load_evaluation(places["after"]),
        choice=None,
        num_devices=2,
        versions={"depthmix": "0.1.0", "commit": "0123abcde"},
    )  # fmt: skip


def test_a_result_is_read_as_it_was_saved(result):
    assert save_result(result) == result.output_dir / "results.json"
    assert load_result(result.output_dir) == result


def test_runs_of_earlier_versions_are_read(result):
    path = save_result(replace(result, before=None))
    assert load_result(result.output_dir).before is None
    content = json.loads(path.read_text())
    assert "before" not in content
    # As earlier versions wrote it.
    del content["data"], content["num_devices"]
    content["after"] = {"metric": "choices", "correct": [True, False], "measures": {"nll": 0.25}}
    path.write_text(json.dumps(content))
    read = load_result(result.output_dir)
    assert read.before is None
    assert read.after.task.mean == 0.5
    assert list(read.after.task.scores.values()) == [1, 0]
    assert read.after.task.measures == {"nll": 0.25}
    assert read.after == load_evaluation(result.output_dir)
    assert read.data == {}
    assert read.num_devices == 1
    for damaged in ({"metric": "choices"}, {"correct": [1]}):
        path.write_text(json.dumps({**content, "after": damaged}))
        with pytest.raises(ValueError, match=r"Cannot read .*results.json: KeyError"):
            load_result(result.output_dir)


def test_what_is_no_finished_run_is_refused(result):
    with pytest.raises(FileNotFoundError, match=r"holds no results.json; finish the run"):
        load_result(Path(result.output_dir))
    path = save_result(result)
    for content in ("{", "[]", "{}", json.dumps({"ledger": {"lora": 1}, "log_history": [],
                    "metrics": {}})):  # fmt: skip
        path.write_text(content)
        with pytest.raises(ValueError, match=r"Cannot read .*results.json: "):
            load_result(result.output_dir)


def test_a_run_goes_on_under_the_settings_it_began_with(tmp_path):
    given = {
        "model": {"name": "m"},
        "data": {"train": "t.jsonl", "without": ["b", "a"]},
        "mode": {"r": 4},
        "training": {"learning_rate": 1e-3, "num_train_epochs": 2, "hub_token": "secret"},
    }

    def changed(section, option, value):
        return load_run_config(None, {**given, section: {**given.get(section, {}), option: value}})

    check_resumed(load_run_config(None, given), tmp_path)  # none began there
    save_run_config(load_run_config(None, given), tmp_path)
    check_resumed(load_run_config(None, given), tmp_path)
    for section, option, value in (
        ("data", "without", ["a", "b"]),
        ("training", "logging_steps", 7),
        ("training", "save_steps", 7),
        ("training", "output_dir", "elsewhere"),
        ("training", "hub_token", "another"),
        ("training", "per_device_train_batch_size", 2),
        ("training", "gradient_checkpointing", True),
        ("training", CHECKPOINTING, True),
    ):
        check_resumed(changed(section, option, value), tmp_path)
    evaluation = {"data": "test.jsonl", "metric": "choices"}
    check_resumed(load_run_config(None, {**given, "evaluation": evaluation}), tmp_path)
    for section, option, value, message in (
        ("mode", "r", 8, r"`mode.r` must be 4 to go on .* got 8; leave it so"),
        ("mode", "late_layers", 2, r"`mode.late_layers` must be None to go on"),
        ("training", "num_train_epochs", 3, r"`training.num_train_epochs` must be 2.0 to go on"),
        ("data", "train", "u.jsonl", "`data.train` must be 't.jsonl'"),
        ("data", "without", ["a"], "`data.without` must be"),
        ("model", "dtype", "float32", "`model.dtype` must be"),
    ):
        with pytest.raises(ValueError, match=message):
            check_resumed(changed(section, option, value), tmp_path)
    with pytest.raises(ValueError, match="`method` must be 'mode'"):
        check_resumed(load_run_config(None, {**given, "method": "lora"}), tmp_path)


def test_an_evaluation_is_no_run(tmp_path, capsys):
    write_evaluation(tmp_path / "evaluation", {"records": [1, 0]})
    told = r"`run` must be .* finished run, and .*evaluation holds an evaluation; name the folder"
    with pytest.raises(ValueError, match=told):
        load_result(tmp_path / "evaluation")
    assert depthmix_cli.main(["report", str(tmp_path / "evaluation")]) == 1
    assert "holds an evaluation" in capsys.readouterr().err
