"""A mixture without PEFT: attach, save, load, detach."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import depthmix
from depthmix import MoDEConfig, attach, detach
from models import random_ids, randomise, tiny_model

INPUT_IDS = random_ids(2, 7)


@torch.no_grad()
def logits(model):
    return model.eval()(INPUT_IDS).logits


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"router_init": "identity", "train_final_norm": True}])
def test_saved_is_the_same(model_type, options, tmp_path):
    model = tiny_model(model_type)
    plain = logits(model)
    norm = attach(model, late_layers=2, **options)
    randomise(norm.mixture, only_trainable=True)
    mixed = logits(model)
    depthmix.save(model, tmp_path)
    assert torch.equal(logits(model), mixed)
    assert torch.equal(logits(depthmix.load(tmp_path)), mixed)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), plain)
    detach(model)
    assert torch.equal(logits(model), plain)


def test_a_merged_adapter_can_be_saved(tmp_path):
    tuned = get_peft_model(tiny_model(), MoDEConfig(target_modules=["q_proj"], late_layers=2))
    randomise(tuned, only_trainable=True)
    merged = tuned.merge_and_unload()
    depthmix.save(merged, tmp_path)
    assert torch.equal(logits(depthmix.load(tmp_path)), logits(merged))


def test_damage_is_one_sentence(tmp_path):
    model = tiny_model()
    with pytest.raises(RuntimeError, match="no attached mixture to save"):
        depthmix.save(model, tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no"):
        depthmix.load(tmp_path)
    attach(model, late_layers=2)
    depthmix.save(model, tmp_path)
    weights = tmp_path / "mixture.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="is damaged"):
        depthmix.load(tmp_path)
    with pytest.raises(RuntimeError, match="has a mixture already"):
        attach(model, late_layers=2)
