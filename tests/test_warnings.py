"""No command, and no way to an adapter in it, warns of names that are to go."""

from __future__ import annotations

import json
import warnings

import pytest
from peft import get_peft_model

import depthmix_cli
from depthmix import MoDEConfig, MoDESFTTrainer
from depthmix.adapters.calls import without_old_name
from models import tiny_model
from runs import make_runs
from test_training import make_trainer

PASSING = (FutureWarning, DeprecationWarning, PendingDeprecationWarning)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make two runs, and records that neither has been evaluated on."""
    folder = tmp_path_factory.mktemp("runs")
    make_runs(folder, {"first": {}, "second": {"training": {"seed": "1"}}})
    records = [{"prompt": "A:", "choices": [" a", " b"], "answer": n % 2} for n in range(3)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "others.jsonl").write_text(lines)
    return folder


def passing(caught):
    return [str(one.message) for one in caught if issubclass(one.category, PASSING)]


TRAIN = (
    "train --model.name {0}/base --model.dtype float32 --data.train {0}/sums.jsonl "
    "--mode.late-layers 2 --mode.target-modules q_proj,v_proj --training.max-steps 1 "
    "--training.report-to none --training.save-strategy no"
)


@pytest.mark.parametrize(
    "command",
    [
        f"{TRAIN} --training.output-dir {{0}}/mode",
        f"{TRAIN} --training.output-dir {{0}}/lora --method lora",
        f"{TRAIN} --training.output-dir {{0}}/again --training.gradient-checkpointing true",
        "info {0}/base",
        "info {0}/runs/first",
        "generate {0}/runs/first hello --generation.max-new-tokens 2",
        "lens {0}/runs/first hello --output {0}/lens.html",
        "evaluate {0}/runs/first {0}/runs/second --records {0}/others.jsonl --metric choices",
        "compare {0}/runs/first {0}/runs/second",
        "report {0}/runs/first",
    ],
)
def test_no_command_warns_of_names_that_are_to_go(command, folder, capsys):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        code = depthmix_cli.main(command.format(folder).split())
    assert code == 0, capsys.readouterr().err
    assert not passing(caught)


def test_trainers_put_an_adapter_on_without_it(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(MoDESFTTrainer, tiny_model(), tmp_path)
    assert not passing(caught)


def test_other_warnings_are_left():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with without_old_name():
            get_peft_model(tiny_model(), MoDEConfig(target_modules=["q_proj"], late_layers=2))
            warnings.warn("another name is deprecated", FutureWarning, stacklevel=1)
    assert passing(caught) == ["another name is deprecated"]
