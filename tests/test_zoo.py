"""Saving and loading, whatever transformers calls a model's weights in a file."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import depthmix
from depthmix import MoDEConfig, attach, find_backbone
from models import randomise
from zoo import build, list_causal_models, runs_alone

IDS = torch.tensor([[3, 4, 5, 9, 7]])

RENAMED = ["gemma3", "phimoe", "nemotron_h", "fuyu", "got_ocr2", "mixtral"]
"""Some whose names in a file are others than in the model: of parts, or of a mixture's `router`."""

PAIRS = {
    f"{config.model_type}-{model.__name__}": (config, model)
    for config, model in list_causal_models()
}


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


def assert_same(model, expected):
    # Experts may be summed in another order after a file has changed their place in memory.
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def save_and_load(model, folder):
    """Save with an attached mixture, as an adapter by two doors, and merged; load all of them."""
    model.save_pretrained(folder / "base")
    norm = attach(model, late_layers=2, router_init="gaussian")
    randomise(norm.mixture)
    model.save_pretrained(folder / "attached")
    assert_same(depthmix.load(folder / "attached"), logits(model))
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    norm = attach(base, late_layers=2)
    randomise(norm.mixture)
    base.save_pretrained(folder / "again", max_shard_size="10KB")
    assert_same(depthmix.load(folder / "again"), logits(base))

    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    layer = find_backbone(base).layers[0]
    linear = [name for name, module in layer.named_modules() if type(module) is nn.Linear]
    targets = [name for name in linear if "out_proj" not in name and "gate" not in name][:1]
    tuned = get_peft_model(base, MoDEConfig(late_layers=2, r=2, target_modules=targets))
    randomise(tuned, only_trainable=True)
    expected = logits(tuned)
    tuned.save_pretrained(folder / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(folder / "adapter")
    assert_same(plain, expected)
    plain.save_pretrained(folder / "plain")
    for adapter in ("adapter", "plain"):
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        assert_same(PeftModel.from_pretrained(base, folder / adapter), expected)
    merged = tuned.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    assert_same(depthmix.load(folder / "merged"), logits(merged))


@pytest.mark.parametrize("model_type", RENAMED)
def test_renamed_weights_come_back(model_type, tmp_path):
    pair = next(pair for pair in PAIRS.values() if pair[0].model_type == model_type)
    model, reason = build(*pair)
    assert model is not None, reason
    save_and_load(model, tmp_path)


@pytest.mark.slow
def test_every_causal_model_comes_back(tmp_path):
    too_big_or_broken, refused, failed, fine = {}, {}, {}, []
    for name, pair in PAIRS.items():
        model, reason = build(*pair)
        if model is None or not runs_alone(model):
            too_big_or_broken[name] = reason or "another answer each time, or NaN"
            continue
        try:
            find_backbone(model)
        except (TypeError, ValueError) as error:
            refused[name] = str(error)
            continue
        try:
            save_and_load(model, tmp_path)
            fine.append(name)
        except Exception as error:  # all of them are told at the end
            failed[name] = f"{type(error).__name__}: {error}"
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
    for name, reason in (too_big_or_broken | refused).items():
        print(f"{name}: {reason}")
    print(f"{len(fine)} of {len(PAIRS)} were saved and loaded: {', '.join(fine)}")
    assert not failed
    assert len(fine) >= 100
