"""Adapters: every way of saving, loading, switching and merging."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import torch.multiprocessing
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from adapters import OPTIONS, logits, lora_targets, redrawn, tuned_model
from depthmix import MoDEConfig
from depthmix.adapters.attached import MoDENorm
from depthmix.method.norm import active_mixture, find_mixture_norm
from models import tiny_model


def test_saved_adapter_holds_the_adapter_alone(adapter):
    saved = load_file(adapter[0] / "adapter_model.safetensors")
    assert {key for key in saved if "lora_mode" in key} == {
        "base_model.model.model.norm.lora_mode.norms.2.weight",
        "base_model.model.model.norm.lora_mode.norms.3.weight",
        "base_model.model.model.norm.lora_mode.router.weight",
    }
    assert len(saved) == 3 + 2 * 2  # LoRA's two factors in two modules of the one layer below
    config = json.loads((adapter[0] / "adapter_config.json").read_text())
    assert config["peft_type"] == "MODE_LORA"
    assert config["final_norm"] == "model.norm"


@pytest.mark.parametrize(
    "load",
    [
        lambda base, adapter: PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), adapter
        ),
        lambda base, adapter: PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), adapter, low_cpu_mem_usage=True
        ),
        lambda _base, adapter: AutoPeftModelForCausalLM.from_pretrained(adapter),
        lambda _base, adapter: AutoModelForCausalLM.from_pretrained(adapter),
    ],
    ids=["PeftModel", "low_cpu_mem_usage", "AutoPeftModel", "AutoModel"],
)
def test_loaded_is_the_same(load, base_dir, adapter, caplog):
    with caplog.at_level(logging.INFO):
        model = load(base_dir, adapter[0]).eval()
    assert torch.equal(logits(model), adapter[1])
    assert "LOAD REPORT" not in caplog.text
    assert "MISSING" not in caplog.text


def test_plain_model_loads_and_switches_the_adapter(base_dir, adapter, caplog):
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    plain = logits(model)
    with caplog.at_level(logging.INFO):
        model.load_adapter(adapter[0])
    assert torch.equal(logits(model), adapter[1])
    assert "MISSING" not in caplog.text
    model.disable_adapters()
    assert torch.equal(logits(model), plain)
    model.enable_adapters()
    assert torch.equal(logits(model), adapter[1])


def test_adapters_of_different_depth_are_switched_and_deleted():
    model = tiny_model()
    plain = logits(model)
    tuned = tuned_model(model, late_layers=2)
    shallow = logits(tuned)
    tuned.add_adapter("deep", MoDEConfig(target_modules=[], late_layers=4, top_k=2))
    assert torch.equal(logits(tuned), shallow)
    tuned.set_adapter("deep")
    deep = logits(redrawn(tuned, seed=6))
    assert not torch.allclose(deep, shallow, atol=1e-2)
    tuned.set_adapter("default")
    assert torch.equal(logits(tuned), shallow)
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned), plain)
    assert torch.equal(logits(tuned), shallow)
    tuned.delete_adapter("default")
    assert torch.equal(logits(tuned), deep)
    assert not any(".default." in name for name, _ in tuned.named_parameters())


@pytest.mark.parametrize("name", ["second", "norms", "router", "0"])
def test_second_adapter_is_saved_and_loaded_by_its_name(name, tmp_path):
    tuned = tuned_model()
    tuned.add_adapter("other", MoDEConfig(**{**OPTIONS, "late_layers": [2, 4]}))
    tuned.set_adapter("other")
    expected = logits(redrawn(tuned, seed=6))
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert not torch.equal(logits(loaded.eval()), expected)
    loaded.load_adapter(tmp_path / "other", adapter_name=name)
    loaded.set_adapter(name)
    assert torch.equal(logits(loaded), expected)


def test_only_the_active_adapter_is_trained():
    tuned = tuned_model()
    tuned.add_adapter("other", MoDEConfig(**OPTIONS))
    for active, idle in (("default", "other"), ("other", "default")):
        tuned.set_adapter(active)
        trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
        assert f"base_model.model.model.norm.lora_mode.{active}.router.weight" in trained
        assert not any(f".{idle}." in name for name in trained)


def test_model_status():
    status = tuned_model().get_model_status()
    assert status.peft_types == {"default": "MODE_LORA"}
    assert status.active_adapters == ["default"]
    assert status.requires_grad == {"default": True}
    assert status.trainable_params == 2 * (16 + 16 + 16 + 24) + 2 * 16 + 3 * 16
    assert status.num_adapter_layers == 3


def test_merge_folds_lora_and_keeps_the_mixture():
    tuned = tuned_model()
    expected = logits(tuned)
    merged = tuned.merge_and_unload()
    assert type(merged) is type(tiny_model())
    assert not lora_targets(merged)
    assert isinstance(merged.model.norm, MoDENorm)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert {name for name in merged.state_dict() if "model.norm" in name} == {
        "model.norm.base_layer.weight",
        "model.norm.mixture.norms.2.weight",
        "model.norm.mixture.norms.3.weight",
        "model.norm.mixture.router.weight",
    }


def test_merge_of_a_chosen_adapter():
    tuned = tuned_model()
    tuned.add_adapter("other", MoDEConfig(**{**OPTIONS, "late_layers": 2}))
    tuned.set_adapter("other")
    expected = logits(redrawn(tuned, seed=6))
    tuned.set_adapter("default")
    merged = tuned.merge_and_unload(adapter_names=["other"])
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


def three_adapters():
    """Adapters of two depths, and one with LoRA in other layers; the last one is active."""
    tuned = tuned_model()
    for name, options in (("shallow", {"late_layers": 2}), ("all", {"adapt": "all"})):
        tuned.add_adapter(name, MoDEConfig(**{**OPTIONS, **options}))
        tuned.set_adapter(name)
        redrawn(tuned, seed=len(name))
    expected = {}
    for name in ("default", "shallow", "all"):
        tuned.set_adapter(name)
        expected[name] = logits(tuned)
    return tuned, expected


def test_adapters_switched_deleted_loaded_and_merged_in_turn(tmp_path):
    tuned, expected = three_adapters()
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned), logits(tiny_model()))
    tuned.save_pretrained(tmp_path)
    tuned.delete_adapter("shallow")
    assert torch.equal(logits(tuned), expected["all"])
    tuned.load_adapter(tmp_path / "shallow", "again")
    assert torch.equal(logits(tuned), expected["all"])
    tuned.set_adapter("again")
    assert torch.equal(logits(tuned), expected["shallow"])
    tuned.delete_adapter("again")
    assert torch.equal(logits(tuned), expected[tuned.active_adapter])
    tuned.set_adapter("default")
    merged = tuned.merge_and_unload(adapter_names=["all"])
    torch.testing.assert_close(logits(merged), expected["all"], rtol=1e-4, atol=1e-4)


def test_the_last_adapter_deleted_leaves_the_base():
    tuned = tuned_model()
    tuned.delete_adapter("default")
    assert torch.equal(logits(tuned.base_model.model), logits(tiny_model()))
    tuned.add_adapter("default", MoDEConfig(**OPTIONS))
    tuned.set_adapter("default")
    expected = logits(redrawn(tuned, seed=5))
    assert torch.equal(expected, logits(tuned_model()))


def test_what_is_merged_while_adapters_are_disabled_is_the_whole_adapter():
    tuned = tuned_model()
    expected = logits(tuned)
    with tuned.disable_adapter():
        merged = tuned.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["default", "all"], ValueError, "must name one MoDE adapter at a time"),
        (["al"], ValueError, r"it has default, shallow, all, got 'al'"),
        ("all", TypeError, "must be a list of one name, got 'all'"),
    ],
)
def test_a_merge_that_cannot_be_leaves_the_model_as_it_was(names, error, message):
    tuned, expected = three_adapters()
    with pytest.raises(error, match=message):
        tuned.merge_and_unload(adapter_names=names)
    assert torch.equal(logits(tuned), expected["all"])


def test_a_safe_merge_looks_at_the_mixture_too():
    tuned = tuned_model()
    torch.testing.assert_close(
        logits(tuned_model().merge_and_unload(safe_merge=True)), logits(tuned), rtol=1e-4, atol=1e-4
    )
    with torch.no_grad():
        active_mixture(tuned).router.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="`safe_merge` found a weight that is not finite"):
        tuned.merge_and_unload(safe_merge=True)
    assert lora_targets(tuned)


def test_layers_cannot_be_merged_one_by_one():
    tuned = tuned_model()
    expected = logits(tuned)
    norm = find_mixture_norm(tuned)
    with pytest.raises(ValueError, match="`merge_adapter` cannot merge a mixture"):
        norm.merge()
    with pytest.warns(UserWarning, match="Already unmerged"):
        tuned.unmerge_adapter()
    assert torch.equal(logits(tuned), expected)


def test_unload_gives_the_base_back():
    base = tiny_model()
    plain, weights = logits(base), {name: p.clone() for name, p in base.state_dict().items()}
    unloaded = tuned_model(base).unload()
    assert torch.equal(logits(unloaded), plain)
    assert unloaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in unloaded.state_dict().items())
    hooks = [h for m in unloaded.modules() for h in (*m._forward_pre_hooks, *m._forward_hooks)]
    assert not hooks
    again = tuned_model(unloaded)
    assert torch.equal(logits(again), logits(tuned_model()))
