"""A mixture without PEFT: attach, save, load, detach."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainingArguments

import depthmix
from depthmix import MoDEConfig, MoDETrainer, attach, detach, set_top_k
from depthmix.attachment import find_mixture_norm
from depthmix.checkpoint import read_mixture_options
from depthmix.models import load_model
from depthmix.run_config import ModelSection
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
    set_top_k(model, 1)  # for a look, which is not saved
    model.save_pretrained(tmp_path)
    set_top_k(model, None)
    assert torch.equal(logits(model), mixed)
    assert torch.equal(logits(depthmix.load(tmp_path)), mixed)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), plain)
    detach(model)
    assert torch.equal(logits(model), plain)
    model.save_pretrained(tmp_path / "plain")
    assert read_mixture_options(tmp_path / "plain") is None


@pytest.mark.parametrize("max_shard_size", ["5GB", "10KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_adapter_can_be_saved(tmp_path, dtype, max_shard_size):
    tiny_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    tuned = get_peft_model(base, MoDEConfig(target_modules=["q_proj"], late_layers=2))
    randomise(tuned, only_trainable=True)
    merged = tuned.merge_and_unload()
    merged.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "10KB")
    loaded = depthmix.load(tmp_path, dtype=dtype)
    assert torch.equal(logits(loaded), logits(merged))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(plain.model.norm.weight, merged.model.norm.base_layer.weight)
    again = load_model(ModelSection(name=str(tmp_path), dtype=str(dtype).removeprefix("torch.")))
    assert torch.equal(logits(again), logits(merged))


def test_a_trainers_checkpoint_is_gone_on_from_and_loaded(tmp_path):
    ids = random_ids(8, 7)
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    common = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_steps": 2}
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=4, **common)

    def make_trainer():
        model = tiny_model()
        attach(model, late_layers=2, router_init="gaussian")
        randomise(find_mixture_norm(model), only_trainable=True)
        return MoDETrainer(model=model, args=arguments, train_dataset=data)

    whole = make_trainer()
    whole.train()
    first = depthmix.load(tmp_path / "checkpoint-2")
    assert not torch.equal(logits(first), logits(whole.model))
    resumed = make_trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(resumed.model), logits(whole.model))
    assert torch.equal(logits(depthmix.load(tmp_path / "checkpoint-4")), logits(whole.model))


def test_a_state_dict_of_weights_has_their_ordinary_names():
    model = tiny_model("gpt2")
    ordinary = list(model.state_dict())
    norm = attach(model, late_layers=2)
    state = model.state_dict()
    assert [name for name in state if ".mixture." not in name] == ordinary
    randomise(model, seed=8)
    before = {name: value.clone() for name, value in state.items()}
    randomise(model, seed=9)
    model.load_state_dict(before)
    assert torch.equal(norm.base_layer.weight, before["transformer.ln_f.weight"])
    assert torch.equal(norm.mixture.router.weight, before["transformer.ln_f.mixture.router.weight"])


def test_damage_is_one_sentence(tmp_path, recwarn):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=r"has no config\.json that tells of one"):
            depthmix.load(folder)
    attach(model, late_layers=2)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    complete = load_file(weights)

    def store(state):
        save_file(state, weights, metadata={"format": "pt"})

    lost = "model.norm.mixture.router.weight"
    store({name: value for name, value in complete.items() if name != lost})
    with pytest.raises(ValueError, match=f"lack {lost}, or have"):
        depthmix.load(tmp_path)
    store({name: value for name, value in complete.items() if name != "model.norm.weight"})
    with pytest.raises(ValueError, match=r"lack model\.norm\.weight, or have"):
        depthmix.load(tmp_path)
    store(complete | {lost: torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="does not fit its model"):
        depthmix.load(tmp_path)
    assert not [one for one in recwarn if "holds weights" in str(one.message)]
    store(complete | {"model.other": torch.zeros(2)})
    with pytest.warns(UserWarning, match=r"does not have: model\.other"):
        depthmix.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        depthmix.load(tmp_path)
    with pytest.raises(RuntimeError, match="has a mixture already"):
        attach(model, late_layers=2)
