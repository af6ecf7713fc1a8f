"""What a run leaves in its folder can be read again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from depthmix import TrainResult
from depthmix.evaluation.scoring import Evaluation
from depthmix.ledger import Ledger
from depthmix.run_folder import load_result, save_result


@pytest.fixture
def result(tmp_path):
    before = Evaluation(metric="choices", correct=(True, False), responses=(" a", " b"))
    return TrainResult(
        output_dir=tmp_path,
        metrics={"train_runtime": 1.5, "total_seconds": 2.0},
        log_history=[{"step": 1, "loss": 0.1 + 0.2, "routing_weight/layer_9": 1 / 3}],
        ledger=Ledger(
            lora_below=5, lora_late=0, norms=2, router=3, other=0, total=10, model=1000
        ),
        data={"given": 3, "dropped": 1, "used": 2},
        before=before,
        after=replace(before, correct=(True, True), measures={"acc": 1.0, "nll": 0.25}),
        choice=None,
        num_devices=2,
        versions={"depthmix": "0.1.0", "commit": "0123abcde"},
    )  # fmt: skip


def test_a_result_is_read_as_it_was_saved(result):
    assert save_result(result) == result.output_dir / "results.json"
    assert load_result(result.output_dir) == result


def test_runs_without_evaluation_or_responses_are_read(result):
    path = save_result(replace(result, before=None))
    content = json.loads(path.read_text())
    # As earlier versions wrote it.
    del content["after"]["responses"], content["data"], content["num_devices"]
    path.write_text(json.dumps(content))
    read = load_result(result.output_dir)
    assert read.before is None
    assert read.after == replace(result.after, responses=("", ""))
    assert read.data == {}
    assert read.num_devices == 1


def test_what_is_no_finished_run_is_refused(result):
    with pytest.raises(FileNotFoundError, match=r"holds no results.json; finish the run"):
        load_result(Path(result.output_dir))
    path = save_result(result)
    for content in ("{", "[]", "{}", json.dumps({"ledger": {"lora": 1}, "log_history": [],
                    "metrics": {}})):  # fmt: skip
        path.write_text(content)
        with pytest.raises(ValueError, match=r"Cannot read .*results.json: "):
            load_result(result.output_dir)
