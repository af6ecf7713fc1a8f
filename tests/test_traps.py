"""Traps of the libraries around: each is sprung, and the mixture must not fall into it."""

from __future__ import annotations

import json
import logging
import warnings
from concurrent.futures import ThreadPoolExecutor

import peft.mapping
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from depthmix import MoDEConfig, attach
from depthmix.adapters.model import MoDEModel
from depthmix.adapters.peft_type import add_peft_type
from depthmix.method.norm import find_mixture_norm
from depthmix.training.trainers.mixin import MoDESFTTrainer
from models import random_ids, randomise, tiny_model
from references import reference_step
from test_training import SFTTrainer, as_batch, make_dataset, train_once
from test_training import tuned_model as trainable_model

INPUT_IDS = random_ids(2, 7)


@torch.no_grad()
def logits(model, input_ids=INPUT_IDS):
    return model(input_ids).logits


def tuned_model(model):
    tuned = get_peft_model(
        model, MoDEConfig(target_modules=["q_proj", "down_proj"], r=2, late_layers=2)
    )
    randomise(tuned, seed=5, only_trainable=True)
    return tuned.eval()


@pytest.fixture
def adapter_dir(tmp_path):
    """Save a base model, and an adapter whose configuration points to it."""
    tiny_model().save_pretrained(tmp_path / "base")
    tuned = tuned_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    tuned.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def load_report(adapter_dir, caplog):
    """Load the adapter as transformers does; give the model and what was complained about."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        model = AutoModelForCausalLM.from_pretrained(adapter_dir).eval()
    return model, "\n".join(line for line in caplog.messages if "MISSING" in line)


def register(monkeypatch, adapter_dir, *, name, prefix):
    """Let PEFT know the method by another name or prefix, and the saved adapter as well."""
    member = add_peft_type(name)
    model_cls = type("TrappedModel", (MoDEModel,), {"prefix": prefix})

    class TrappedConfig(MoDEConfig):
        def __post_init__(self):
            super().__post_init__()
            self.peft_type = member

    for mapping, value in (
        ("PEFT_TYPE_TO_CONFIG_MAPPING", TrappedConfig),
        ("PEFT_TYPE_TO_TUNER_MAPPING", model_cls),
        ("PEFT_TYPE_TO_PREFIX_MAPPING", prefix),
    ):
        monkeypatch.setitem(getattr(peft.mapping, mapping), member, value)
    path = adapter_dir / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": name}))


def test_the_methods_name_hides_no_base_weight(adapter_dir, monkeypatch, caplog):
    model, complaints = load_report(adapter_dir, caplog)
    assert not complaints
    assert model.active_adapters() == ["default"]
    register(monkeypatch, adapter_dir, name="MODE", prefix="lora_")
    _, complaints = load_report(adapter_dir, caplog)
    assert "embed_tokens" in complaints


def test_the_prefix_lets_lora_weights_through(adapter_dir, monkeypatch, caplog):
    model, _ = load_report(adapter_dir, caplog)
    saved = load_file(adapter_dir / "adapter_model.safetensors")
    loaded = {name.replace(".default", ""): p for name, p in model.named_parameters()}
    for name, value in saved.items():
        assert torch.equal(loaded[name.removeprefix("base_model.model.")], value)
    register(monkeypatch, adapter_dir, name="MODE_PREFIX", prefix="lora_mode_")
    trapped, _ = load_report(adapter_dir, caplog)
    assert not torch.allclose(logits(trapped), logits(model), atol=1e-2)


def patch_as_liger_does(norm):
    """Put another forward into the module's `__dict__`, as `_bind_method_to_module` does."""

    def forward(_self, hidden_states):
        return torch.zeros_like(hidden_states)

    norm.__dict__["forward"] = forward.__get__(norm, norm.__class__)


@pytest.mark.parametrize("way", ["peft", "attach"])
def test_liger_does_not_bypass_the_mixture(way):
    model = tiny_model()
    if way == "peft":
        model = tuned_model(model).get_base_model()
    else:
        randomise(attach(model, late_layers=2).mixture, seed=5)
    expected = logits(model)
    norm = find_mixture_norm(model)
    assert norm is model.model.norm
    patch_as_liger_does(norm)
    assert torch.equal(logits(model), expected)
    plain = tiny_model()
    patch_as_liger_does(plain.model.norm)
    assert not logits(plain).any()


def test_plain_sft_trainer_leaves_the_distillation_out(tmp_path):
    dataset = make_dataset()
    truth = reference_step(trainable_model(), as_batch(dataset))
    plain, _ = train_once(SFTTrainer, trainable_model(distillation_weight=0.5), tmp_path)
    whole, _ = train_once(MoDESFTTrainer, trainable_model(distillation_weight=0.5), tmp_path)
    assert plain["loss"] == pytest.approx(truth.task, rel=1e-4)
    assert whole["loss"] == pytest.approx(truth.task + 0.5 * truth.distillation, rel=1e-4)


def test_plain_sft_trainer_is_warned_about(tmp_path):
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    with pytest.warns(UserWarning, match="leaves the distillation loss out"):
        train_once(SFTTrainer, trainable_model(distillation_weight=0.5), tmp_path, **batches)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*leaves the distillation loss out")
        train_once(MoDESFTTrainer, trainable_model(distillation_weight=0.5), tmp_path, **batches)


def test_two_threads_share_a_model():
    model = tuned_model(tiny_model())
    batches = [random_ids(2, 5 + seed % 3, seed=seed) for seed in range(120)]
    expected = [logits(model, batch) for batch in batches]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda batch: logits(model, batch), batches))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_two_threads_train_one_model():
    model = tuned_model(tiny_model()).train()

    def loss(ids):
        return model(input_ids=ids, labels=ids).loss.detach()

    batches = [random_ids(2, 5 + seed % 3, seed=seed) for seed in range(60)]
    expected = [loss(batch) for batch in batches]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(loss, batches))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
