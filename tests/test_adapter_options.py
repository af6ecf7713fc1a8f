"""Adapters: variants of LoRA, configurations, and what is refused."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
import torch.multiprocessing
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from adapters import INPUT_IDS, OPTIONS, greedy, logits, lora_targets, redrawn, tuned_model
from depthmix import MoDEConfig
from depthmix.adapters.baseline import to_lora
from depthmix.method.norm import active_mixture, find_mixture_norm
from depthmix.method.presets import PAPER_MODE
from models import tiny_model


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"target_modules": []},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q|v)_proj"},
        {"rank_pattern": {"q_proj": 3}},
        {"modules_to_save": ["lm_head"]},
        {"adapt": "all", "layers_to_transform": [0, 3]},
    ],
    ids=lambda options: " ".join(options),
)
def test_variant_is_saved_loaded_and_merged(options, tmp_path):
    base = tiny_model()
    plain = logits(base)
    tuned = tuned_model(base, **options)
    expected = logits(tuned)
    assert not torch.allclose(expected, plain, atol=1e-2)
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    assert torch.equal(logits(loaded), expected)
    torch.testing.assert_close(logits(tuned.merge_and_unload()), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("adapt", "layers"), [("below", {"0"}), ("all", {"0", "1", "2", "3"})])
def test_adapted_layers(adapt, layers):
    targets = lora_targets(tuned_model(target_modules="all-linear", adapt=adapt))
    assert {name.split(".")[4] for name in targets} == layers
    assert len(targets) == 7 * len(layers)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_expert_parameters_below_the_late_layers(model_type, tmp_path):
    options = {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "lora_dropout": 0.0,
        "late_layers": 2,
    }
    tuned = tuned_model(tiny_model(model_type), **options)
    expected = logits(tuned)
    targets = lora_targets(tuned)
    assert {name.split(".")[4] for name in targets} == {"0", "1"}
    assert sum("experts" in name for name in targets) == 4
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(model_type), tmp_path).eval()
    assert torch.equal(logits(loaded), expected)


def test_from_lora_keeps_every_field():
    lora = LoraConfig(r=3, lora_alpha=5, target_modules=["v_proj"], use_dora=True, bias="none")
    before = copy.deepcopy(lora)
    config = MoDEConfig.from_lora(lora, late_layers=2, adapt="all")
    assert (config.r, config.lora_alpha, config.use_dora) == (3, 5, True)
    assert config.target_modules == {"v_proj"}
    assert (config.late_layers, config.adapt, config.peft_type) == (2, "all", "MODE_LORA")
    assert lora == before
    assert lora.peft_type == "LORA"


def test_one_configuration_serves_several_models():
    config = MoDEConfig(**OPTIONS)
    untouched = copy.deepcopy(config)
    get_peft_model(tiny_model(), config)
    assert config == untouched
    deeper = get_peft_model(tiny_model(num_hidden_layers=6), config)
    assert active_mixture(deeper).late_layers == (4, 5, 6)


def test_from_preset():
    config = MoDEConfig.from_preset("paper", r=4)
    for name, value in PAPER_MODE.items():
        if name not in ("r", "target_modules"):
            assert getattr(config, name) == value
    assert config.target_modules == set(PAPER_MODE["target_modules"])
    assert config.r == 4
    with pytest.raises(ValueError, match="`preset` must be one of paper, fast, got 'papper'"):
        MoDEConfig.from_preset("papper")


@pytest.mark.parametrize("adapt", ["all", "below"])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "up_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "use_dora": True},
    ],
    ids=["names", "all-linear", "dora"],
)
def test_to_lora_has_the_same_adapters(adapt, options):
    config = MoDEConfig(**{**OPTIONS, **options}, adapt=adapt)
    untouched = copy.deepcopy(config)
    lora = to_lora(config, tiny_model())
    assert config == untouched
    assert type(lora) is LoraConfig
    assert lora.peft_type == "LORA"
    plain = get_peft_model(tiny_model(), lora)
    assert find_mixture_norm(plain) is None
    tuned = get_peft_model(tiny_model(), config)
    assert lora_targets(plain) == lora_targets(tuned)
    shapes = {name: p.shape for name, p in plain.named_parameters() if p.requires_grad}
    assert shapes == {
        name: p.shape
        for name, p in tuned.named_parameters()
        if p.requires_grad and "lora_mode" not in name
    }


def test_to_lora_of_expert_parameters():
    options = {"target_parameters": ["mlp.experts.down_proj"], "target_modules": ["q_proj"]}
    config = MoDEConfig(**options, late_layers=2, r=2)
    plain = get_peft_model(tiny_model("qwen3_moe"), to_lora(config, tiny_model("qwen3_moe")))
    tuned = get_peft_model(tiny_model("qwen3_moe"), config)
    assert lora_targets(plain) == lora_targets(tuned)


def test_merge_adapter_is_refused():
    tuned = tuned_model()
    before = logits(tuned)
    with pytest.raises(ValueError, match="`merge_adapter` cannot merge a mixture"):
        tuned.merge_adapter()
    assert torch.equal(logits(tuned), before)


def test_adapter_on_a_merged_mixture_is_refused():
    merged = tuned_model().merge_and_unload()
    with pytest.raises(RuntimeError, match="has an attached or merged mixture already"):
        tuned_model(merged)


def test_adapters_mixed_in_one_batch_are_refused():
    tuned = tuned_model()
    with pytest.raises(ValueError, match="`adapter_names` cannot mix adapters in one batch"):
        tuned(INPUT_IDS, adapter_names=["default", "__base__", "default"])
    with pytest.raises(ValueError, match="`adapter_names` cannot mix adapters in one batch"):
        greedy(tuned, INPUT_IDS, adapter_names=["default"] * 3)


def test_two_active_mixtures_are_refused():
    tuned = tuned_model()
    tuned.add_adapter("other", MoDEConfig(**OPTIONS))
    tuned.set_adapter("other")
    redrawn(tuned, seed=7)
    tuned.set_adapter("default")
    before = logits(tuned)
    with pytest.raises(ValueError, match="must name one MoDE adapter at a time"):
        tuned.base_model.set_adapter(["default", "other"])
    assert torch.equal(logits(tuned), before)


def test_weighted_sum_of_adapters_is_refused():
    tuned = tuned_model()
    tuned.add_adapter("other", MoDEConfig(**OPTIONS))
    with pytest.raises(ValueError, match="`add_weighted_adapter` cannot combine mixtures"):
        tuned.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")


def test_plain_lora_beside_a_mixture_is_refused():
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        tuned_model().add_adapter("plain", LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("shape", "message"),
    [({"num_hidden_layers": 5}, "4 layers and width 16.* 5 and 16"), ({"hidden_size": 24}, "24")],
)
def test_adapter_of_another_base_is_refused(shape, message, adapter):
    other = tiny_model(**shape)
    with pytest.raises(ValueError, match=f"adapter was made for a model of .*{message}"):
        PeftModel.from_pretrained(other, adapter[0])


def test_truncated_adapter_is_refused(adapter, tmp_path):
    shutil.copy(adapter[0] / "adapter_config.json", tmp_path)
    content = (adapter[0] / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(content[:-100])
    with pytest.raises(Exception, match=r"(?i)incomplete|invalid|header"):
        PeftModel.from_pretrained(tiny_model(), tmp_path)


@pytest.mark.parametrize("lost", ["lora_mode.router", "lora_mode.norms.3", "q_proj.lora_B"])
def test_adapter_with_missing_weights_is_refused(lost, adapter, tmp_path):
    weights = load_file(adapter[0] / "adapter_model.safetensors")
    kept = {name: value for name, value in weights.items() if lost not in name}
    assert len(kept) == len(weights) - 1
    save_file(kept, tmp_path / "adapter_model.safetensors")
    shutil.copy(adapter[0] / "adapter_config.json", tmp_path)
    with pytest.raises(ValueError, match="lacks 1 of the adapter's tensors"):
        PeftModel.from_pretrained(tiny_model(), tmp_path)


@pytest.mark.parametrize("targets", [["no_such_proj"], ["q_proj", "no_such_proj"], "no.*such"])
def test_targets_that_match_nothing_are_refused(targets):
    with pytest.raises(ValueError, match=r"no_such_proj|no\.\*such"):
        tuned_model(target_modules=targets)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"late_layers": 5}, ValueError, r"between 1 and 4 \(the model has 4 layers\), got 5"),
        ({"late_layers": [2, 3]}, ValueError, "must end at the final layer, which is 4"),
        ({"late_layers": 4}, ValueError, "`adapt='below'` leaves no layer to adapt"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        tuned_model(**options)
