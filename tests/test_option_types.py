"""Options given in Python: known by name, of the right type, and none without effect."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from checkpoints import make_tokenizer, save_checkpoint
from depthmix import MixtureConfig, MoDEConfig, attach
from depthmix.data.spec import DataSpec, EvaluationSpec
from depthmix.evaluation.conversations import MTBenchSpec
from depthmix.evaluation.judge import JudgeSpec
from depthmix.evaluation.plan import EvaluationPlan
from depthmix.models.spec import ModelSpec
from depthmix.options.types import is_checked, list_types, members
from models import tiny_model

OWNERS = [MixtureConfig, MoDEConfig, ModelSpec, DataSpec, EvaluationSpec]
OWNERS += [JudgeSpec, MTBenchSpec, EvaluationPlan]

REQUIRED = {
    ModelSpec: {"name": "m"},
    DataSpec: {"train": "t.jsonl"},
    EvaluationSpec: {"data": "e.jsonl", "metric": "choices"},
    JudgeSpec: {"model": "judge"},
    EvaluationPlan: {"records": "e.jsonl"},
}

SAMPLES = [True, "false", "8", "", 3, 2.5, b"x", [1], ["a"], {"a": 1}, object(), [True], None]
"""Values of every kind."""


def takes(hint, value):
    """Say by the annotation alone whether a value may be given, or whether PEFT decides."""
    if not is_checked(hint):
        return True
    for kind in members(hint):
        origin, inner = get_origin(kind), get_args(kind)
        if origin is Literal:
            fits = type(value) in {type(choice) for choice in inner}
        elif kind is float:
            fits = type(value) in (int, float)
        elif origin in (list, tuple) or kind is list:
            fits = isinstance(value, list) and all(takes(inner[0], entry) for entry in value)
        elif origin is dict or kind is dict:
            fits = isinstance(value, dict) and (not inner or takes(inner[1], 1))
        else:
            fits = type(value) is kind or (value is None and kind is type(None))
        if fits:
            return True
    return False


@given(st.sampled_from(OWNERS), st.data(), st.sampled_from(SAMPLES))
def test_a_wrong_type_is_named(owner, data, value):
    option = data.draw(st.sampled_from([option for option in fields(owner) if option.init]))
    hint = list_types(owner)[option.name]
    given_options = REQUIRED.get(owner, {}) | {option.name: value}
    if get_origin(hint) is Literal:
        with pytest.raises(ValueError, match=rf"^`{option.name}` must be one of .*, got"):
            owner(**given_options)
        return
    if not takes(hint, value):
        with pytest.raises(TypeError, match=rf"^`{option.name}` must be .*got .*, which is "):
            owner(**given_options)
        return
    if not is_checked(hint):
        return
    with suppress(ValueError):  # of the right type, and wrong all the same
        owner(**given_options)


@pytest.mark.parametrize("owner", OWNERS)
def test_every_default_is_of_its_own_type(owner):
    for option in fields(owner):
        if option.init and option.default is not MISSING and option.name != "peft_type":
            owner(**{option.name: option.default} | REQUIRED.get(owner, {}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_late_norms": "false"}, "`train_late_norms` must be bool, got 'false', which is "),
        ({"r": "8"}, "`r` must be int, got '8', which is str; write it without quotes"),
        ({"top_k": 2.0}, "`top_k` must be int or none, got 2.0, which is float"),
        ({"log_layer_losses": 1}, "`log_layer_losses` must be bool, got 1, which is int"),
        ({"late_layers": [True, 4]}, r"`late_layers` must be .*, got \[True, 4\], which is list"),
        ({"lora_dropout": None}, "`lora_dropout` must be float, got None, which is NoneType"),
        ({"rank_pattern": ["q_proj"]}, "`rank_pattern` must be dict or none, got .*which is list"),
    ],
)
def test_what_was_given_is_said(options, message):
    with pytest.raises(TypeError, match=message):
        MoDEConfig(**options)


def test_numbers_of_other_libraries_are_numbers(tmp_path):
    config = MoDEConfig(
        r=np.int64(4),
        late_layers=[np.int32(3), torch.tensor(4)],
        lora_dropout=np.float32(0.5),
        distillation_weight=torch.tensor(0.25),
        train_late_norms=np.bool_(False),
        final_norm=Path("model.norm"),
    )
    assert (type(config.r), config.r) == (int, 4)
    assert config.late_layers == [3, 4]
    assert {type(layer) for layer in config.late_layers} == {int}
    assert (config.lora_dropout, config.distillation_weight) == (0.5, 0.25)
    assert config.train_late_norms is False
    assert config.final_norm == "model.norm"
    config.save_pretrained(tmp_path)
    assert MoDEConfig.from_pretrained(tmp_path).late_layers == [3, 4]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: MoDEConfig(target_module=["q_proj"]),
            "`target_module` is not an option of MoDEConfig; did you mean `target_modules`?",
        ),
        (
            lambda: MixtureConfig(late_layer=3),
            "`late_layer` is not an option of MixtureConfig; did you mean `late_layers`?",
        ),
        (
            lambda: attach(tiny_model(), late_layer=3),
            "`late_layer` is not an option of MixtureConfig; did you mean `late_layers`?",
        ),
        (
            lambda: MoDEConfig.from_preset("paper", routes_init="gaussian"),
            "`routes_init` is not an option of MoDEConfig; did you mean `router_init`?",
        ),
        (
            lambda: ModelSpec(name="m", dtyp="auto"),
            "`dtyp` is not an option of ModelSpec; did you mean `dtype`?",
        ),
        (
            lambda: EvaluationPlan(tasks=("gsm8k",), zzz=1),
            "`zzz` is not an option of EvaluationPlan.",
        ),
    ],
)
def test_an_unknown_option_has_the_nearest_one_named(make, message):
    with pytest.raises(TypeError) as error:
        make()
    assert str(error.value) == message


def test_what_a_later_version_wrote_is_told_by_peft(tmp_path):
    config = MoDEConfig(late_layers=2)
    config.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace("{", '{"of_tomorrow": 1,', 1))
    with pytest.warns(UserWarning, match="of_tomorrow"):
        assert MoDEConfig.from_pretrained(tmp_path).late_layers == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": [""]}, r"`target_modules` must hold names .*an empty text is none"),
        ({"target_modules": ""}, r"`target_modules` must hold names .*an empty text is none"),
        ({"target_modules": ["q_proj", " "]}, r"`target_modules` must hold names"),
        ({"exclude_modules": [""]}, r"`exclude_modules` must hold names"),
        ({"layers_to_transform": []}, r"`layers_to_transform` must hold at least one layer"),
        ({"lora_alpha": 0}, r"`lora_alpha` must not be 0"),
        ({"target_parameters": [""]}, r"`target_parameters` must hold names"),
        ({"layers_to_transform": -1}, "`layers_to_transform` must hold indices .* got -1"),
        ({"layers_to_transform": [0, -2]}, "`layers_to_transform` must hold indices .* got -2"),
        ({"r": 0}, "`r` must be at least 1, got 0"),
        ({"target_modules": "["}, r"must be regular expressions, and '\[' is none"),
        ({"rank_pattern": {"((": 2}}, "must be regular expressions, and '..' is none"),
        ({"rank_pattern": {"q_proj": "x"}}, "`rank_pattern` must hold numbers of at least 1"),
        ({"rank_pattern": {"q_proj": 0}}, "`rank_pattern` must hold numbers of at least 1, got 0"),
        ({"alpha_pattern": {"q_proj": None}}, "`alpha_pattern` must hold numbers of at least 0"),
        ({"lora_dropout": 1.0}, "`lora_dropout` must be at least 0 and below 1, got 1"),
        ({"lora_dropout": float("nan")}, "`lora_dropout` must be at least 0 and below 1, got nan"),
        ({"bias": "some"}, "`bias` must be one of none, all, lora_only, got 'some'"),
        ({"adapt": "above"}, "`adapt` must be one of all, below, got 'above'"),
    ],
)
def test_options_without_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MoDEConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers_to_transform": 4}, "`layers_to_transform` must .* from 0 to 3, .*, got 4"),
        ({"layers_to_transform": [0, 99]}, "`layers_to_transform` must .* from 0 to 3, .*, got 99"),
        (
            {"layers_to_transform": 0, "layers_pattern": "blocks"},
            "nothing is left of {'q_proj'} beside `layers_to_transform`, `layers_pattern`",
        ),
        ({"exclude_modules": ["q_proj"]}, "nothing is left of {'q_proj'} beside `exclude_mod"),
        (
            {"exclude_modules": ".*", "target_modules": "all-linear"},
            "nothing is left of 'all-linear' beside `exclude_modules`",
        ),
        ({"trainable_token_indices": [9999]}, "`trainable_token_indices` must be between 0 and"),
        ({"trainable_token_indices": {"embed_tokens": [-1]}}, r"tokens\), got -1"),
        ({"rank_pattern": {"q_porj": 4}}, "`rank_pattern` must name adapted parts .*'q_porj'"),
        ({"alpha_pattern": {"layers.9.*": 4}}, "`alpha_pattern` must name adapted parts"),
    ],
)
def test_options_that_would_adapt_nothing_are_refused(options, message):
    model = tiny_model()
    config = MoDEConfig(**{"target_modules": ["q_proj"], "adapt": "all"} | options)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config)
    assert not any("lora" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_all_linear_layers_are_adapted_under_a_pattern(architecture):
    options = {"exclude_modules": ["down_proj"], "rank_pattern": {"q_proj|c_attn": 2}}
    model = get_peft_model(
        tiny_model(architecture),
        MoDEConfig(target_modules="all-linear", late_layers=2, r=4, **options),
    )
    ranks = {len(p) for name, p in model.named_parameters() if "lora_A" in name}
    assert ranks == {2, 4}


def test_a_base_with_another_vocabulary_is_refused(tmp_path):
    save_checkpoint(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tuned = get_peft_model(base, MoDEConfig(late_layers=2, target_modules=["q_proj"]))
    tuned.save_pretrained(tmp_path / "adapter")
    other = tiny_model("llama", vocab_size=len(make_tokenizer()) + 7)
    with pytest.raises(ValueError, match=r"a model of 260 tokens, and this one has 267"):
        PeftModel.from_pretrained(other, tmp_path / "adapter")
    same = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    PeftModel.from_pretrained(same, tmp_path / "adapter")


def test_tokens_added_later_are_no_other_vocabulary(tmp_path):
    tokenizer = make_tokenizer()
    save_checkpoint(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tuned = get_peft_model(base, MoDEConfig(late_layers=2, target_modules=["q_proj"]))
    tuned.save_pretrained(tmp_path / "adapter")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert loaded.config.vocab_size == len(tokenizer) == 261
