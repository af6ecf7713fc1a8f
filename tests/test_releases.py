"""What differs between releases of transformers, as each of them has it."""

from __future__ import annotations

import runpy
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, TrainingArguments
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.utils import quantization_config
from trl import SFTConfig

from depthmix.libraries import releases
from depthmix.training.trainers.mixin import MoDETrainerMixin
from models import tiny_model


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


def update_and_show_all(layer, keys, values, *_others, **_named):
    """Take states in as a sliding layer that records does before transformers 5.18."""
    if not layer.is_initialized:
        layer.lazy_initialization(keys, values)
    layer.cumulative_length += keys.shape[-2]
    layer.keys = torch.cat([layer.keys, keys], dim=-2)
    layer.values = torch.cat([layer.values, values], dim=-2)
    return layer.keys, layer.values


@pytest.mark.parametrize("shows_all", [False, True])
def test_a_layer_that_records_shows_what_its_mask_has(shows_all, monkeypatch):
    if shows_all:
        monkeypatch.setattr(DynamicSlidingWindowLayer, "update", update_and_show_all)
    cache = DynamicCache(config=tiny_model("mistral").config)
    layer = cache.layers[0]
    states = torch.arange(3.0 * layer.sliding_window)[None, None, :, None]
    undo = releases.record_past(cache)
    for state in states.split(2, dim=-2):
        length, _ = cache.get_mask_sizes(state.shape[-2], 0)
        shown = cache.update(state, -state, 0)
        end = int(state[..., -1, 0]) + 1
        assert torch.equal(shown[0], states[..., end - length : end, :])
        assert torch.equal(shown[1], -shown[0])
    assert torch.equal(layer.keys, states)  # nothing of the past is lost
    undo()
    assert not layer.record_past
    assert "update" not in vars(layer)
