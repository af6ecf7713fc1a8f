"""What differs between releases of transformers, as each of them has it."""

from __future__ import annotations

import runpy
from types import SimpleNamespace

import pytest
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import quantization_config
from trl import SFTConfig

from depthmix import releases
from depthmix.trainers.mixin import MoDETrainerMixin


@pytest.mark.parametrize("config", [TrainingArguments, SFTConfig])
def test_checkpointing_has_the_name_that_is_installed(config):
    assert hasattr(PreTrainedModel, f"{releases.CHECKPOINTING}_enable")
    assert {releases.CHECKPOINTING, f"{releases.CHECKPOINTING}_kwargs"} <= (
        config.__dataclass_fields__.keys()
    )


def test_checkpointing_has_the_new_name_where_there_is_one(monkeypatch):
    new = "activation_checkpointing_enable"
    monkeypatch.setattr(PreTrainedModel, new, print, raising=False)
    assert runpy.run_path(releases.__file__)["CHECKPOINTING"] == "activation_checkpointing"
    monkeypatch.delattr(PreTrainedModel, new)
    assert runpy.run_path(releases.__file__)["CHECKPOINTING"] == "gradient_checkpointing"


def test_gguf_files_are_dequantised_by_a_choice_where_there_is_one(monkeypatch):
    monkeypatch.setattr(quantization_config, "GgufConfig", SimpleNamespace, raising=False)
    assert releases.dequantising() == {"quantization_config": SimpleNamespace(dequantize=True)}
    monkeypatch.delattr(quantization_config, "GgufConfig")
    assert releases.dequantising() == {}


def test_a_trainer_may_say_nothing_of_its_loss():
    assert releases.says_it_is_scaled(SimpleNamespace()) is None
    for said in (True, False, None):
        assert releases.says_it_is_scaled(SimpleNamespace(loss_is_scaled_for_ga=said)) is said


@pytest.mark.parametrize(
    ("said", "counted", "own", "expected"),
    [
        ({"loss_is_scaled_for_ga": False}, True, None, False),
        ({"loss_is_scaled_for_ga": True}, False, None, True),
        ({"loss_is_scaled_for_ga": None}, True, None, True),
        ({}, True, None, True),
        ({}, False, None, False),
        ({}, False, print, True),
    ],
)
def test_a_loss_is_scaled_as_its_trainer_says_or_does(said, counted, own, expected):
    trainer = SimpleNamespace(model_accepts_loss_kwargs=counted, compute_loss_func=own, **said)
    assert MoDETrainerMixin._is_scaled(trainer, num_items_in_batch=3) is expected
