"""Adapters: where they go, a second one beside the first, and configurations that stay apart."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from adapters import OPTIONS, logits, lora_targets, redrawn, tuned_model
from depthmix import MixtureConfig, MoDEConfig, attach, to_lora
from depthmix.method.norm import active_mixture
from models import MOE, tiny_model

EXPERTS = {
    "mixtral": ["experts.gate_up_proj", "experts.down_proj"],
    "qwen3_moe": ["gate_up_proj", "down_proj"],
    "gpt_oss": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "deepseek_v3": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "olmoe": ["experts.gate_up_proj", "experts.down_proj"],
    "granitemoe": ["gate_up_proj", "down_proj"],
    "flex_olmo": ["experts.gate_up_proj", "experts.down_proj"],
    "phimoe": ["experts.gate_up_proj", "experts.down_proj"],
}


def adapted_experts(model_type="mixtral", **options):
    options = {"target_modules": [], "target_parameters": EXPERTS[model_type], **options}
    return tuned_model(tiny_model(model_type, **MOE), late_layers=2, **options)


@pytest.mark.parametrize("model_type", EXPERTS)
def test_a_second_adapter_has_the_same_experts(model_type, tmp_path):
    tuned = adapted_experts(model_type)
    expected = logits(tuned)
    tuned.add_adapter("reference", tuned.peft_config["default"])
    tuned.add_adapter("fresh", MoDEConfig(**{**OPTIONS, **tuned_by_experts(model_type)}))
    assert torch.equal(logits(tuned), expected)
    shapes = [
        {name.replace(f".{adapter}", ""): p.shape for name, p in tuned.named_parameters()
         if f".{adapter}." in name or name.endswith(f".{adapter}")}
        for adapter in ("default", "reference", "fresh")
    ]  # fmt: skip
    assert shapes[0] == shapes[1] == shapes[2]
    assert sum("lora_A" in name for name in shapes[0]) == 2 * (1 if "deepseek" in model_type else 2)
    tuned.set_adapter("fresh")
    second = logits(redrawn(tuned, seed=8))
    assert not torch.allclose(second, expected, atol=1e-2)
    tuned.save_pretrained(tmp_path)
    loaded = type(tuned).from_pretrained(tiny_model(model_type, **MOE), tmp_path).eval()
    loaded.load_adapter(tmp_path / "fresh", adapter_name="again")
    assert torch.equal(logits(loaded), expected)
    loaded.set_adapter("again")
    assert torch.equal(logits(loaded), second)


def tuned_by_experts(model_type):
    return {
        "target_modules": [],
        "target_parameters": EXPERTS[model_type],
        "lora_dropout": 0.0,
        "late_layers": 2,
    }


def test_other_experts_in_a_second_adapter_are_refused_as_for_lora():
    tuned = adapted_experts()
    expected = logits(tuned)
    options = {**OPTIONS, **tuned_by_experts("mixtral"), "target_parameters": ["down_proj"]}
    with pytest.raises(ValueError, match="all adapters must target the same set of parameters"):
        tuned.add_adapter("other", MoDEConfig(**options))
    assert torch.equal(logits(tuned), expected)


def test_experts_are_known_by_their_names_before_transformers_5():
    names = {"target_modules": ["q_proj", "w1", "w2", "w3"], "r": 2}
    tuned = tuned_model(tiny_model("mixtral"), **names, adapt="all")
    plain = get_peft_model(tiny_model("mixtral"), LoraConfig(**names))
    assert lora_targets(tuned) == lora_targets(plain)
    shapes = [
        {name: p.shape for name, p in model.named_parameters() if "lora_A" in name}
        for model in (tuned, plain)
    ]
    assert shapes[0] == shapes[1]
    below = lora_targets(tuned_model(tiny_model("mixtral"), **names, late_layers=2))
    assert {name.split(".")[4] for name in below} == {"0", "1"}
    assert any("experts" in name for name in below)


@pytest.mark.parametrize("targets", [["out_proj"], ["in_proj", "out_proj"], "all-linear"])
def test_targets_that_peft_refuses_for_lora_are_refused(targets):
    options = {"state_size": 8, "intermediate_size": None, "head_dim": None}
    for config in (
        LoraConfig(target_modules=targets),
        MoDEConfig(target_modules=targets, late_layers=2, adapt="all"),
    ):
        with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba"):
            get_peft_model(tiny_model("mamba", **options), config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "norm"]}, "`target_modules` must not name the final"),
        ({"target_modules": r".*(q_proj|\.norm)"}, "`target_modules` must not name the final"),
        ({"modules_to_save": ["norm"]}, "`modules_to_save` must not name the final norm"),
        ({"modules_to_save": ["router"]}, "a part of the mixture, and 'router' does"),
        ({"rank_pattern": {"norm": 4}}, "`rank_pattern` must name modules that get LoRA"),
        ({"alpha_pattern": {r"model\.norm": 4}}, "`alpha_pattern` must name modules that get LoRA"),
    ],
)
def test_the_final_norm_is_no_target(options, message):
    with pytest.raises(ValueError, match=message):
        tuned_model(**options)


@pytest.mark.parametrize("target", ["lora_A", "base_layer", "default", "lora_mode", "router"])
def test_an_adapters_own_parts_are_no_targets(target):
    tuned = tuned_model()
    with pytest.raises(ValueError, match=f"it has none called {target}"):
        tuned.add_adapter("other", MoDEConfig(**{**OPTIONS, "target_modules": [target]}))


def test_a_failed_adapter_leaves_the_model_as_it_was():
    model = tiny_model()
    expected, names = logits(model), [name for name, _ in model.named_modules()]
    for modules in (["q_proj", "input_layernorm"], ["no_such"]):
        with pytest.raises(ValueError, match=r"is not supported|it has none called"):
            tuned_model(model, target_modules=modules)
        assert [name for name, _ in model.named_modules()] == names
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
        assert torch.equal(logits(model), expected)
    merged = tuned_model().merge_and_unload()
    names = [name for name, _ in merged.named_modules()]
    with pytest.raises(RuntimeError, match="has an attached or merged mixture already"):
        tuned_model(merged)
    assert [name for name, _ in merged.named_modules()] == names


def test_a_failed_second_adapter_leaves_the_first():
    tuned = tuned_model()
    expected = logits(tuned)
    names = {name for name, _ in tuned.named_parameters()}
    config = MoDEConfig(**{**OPTIONS, "target_modules": ["q_proj", "input_layernorm"]})
    with pytest.raises(ValueError, match="is not supported"):
        tuned.add_adapter("other", config)
    assert {name for name, _ in tuned.named_parameters()} == names
    assert list(tuned.peft_config) == ["default"]
    assert torch.equal(logits(tuned), expected)


def test_a_configuration_changed_afterwards_changes_no_model():
    config = MoDEConfig(**OPTIONS, rank_pattern={"up_proj": 3})
    untouched = copy.deepcopy(config)
    tuned = redrawn(get_peft_model(tiny_model(), config), seed=5).eval()
    assert config == untouched
    expected, saved = logits(tuned), copy.deepcopy(tuned.peft_config["default"])
    config.late_layers = [2, 4]
    config.top_k, config.router_temperature, config.router_input = 1, 7.0, "raw"
    config.target_modules.add("o_proj")
    config.rank_pattern["up_proj"] = 7
    assert torch.equal(logits(tuned), expected)
    assert tuned.peft_config["default"] == saved


def test_two_adapters_from_one_configuration_stay_apart():
    tuned = tuned_model()
    expected = logits(tuned)
    tuned.add_adapter("other", tuned.peft_config["default"])
    tuned.peft_config["other"].router_temperature = 9.0
    tuned.peft_config["other"].target_modules.clear()
    assert tuned.peft_config["default"].target_modules == set(OPTIONS["target_modules"])
    assert torch.equal(logits(tuned), expected)


def test_what_peft_fills_in_is_not_the_users():
    config = MoDEConfig(
        target_modules=["q_proj"],
        late_layers=2,
        modules_to_save=["lm_head"],
        ensure_weight_tying=True,
    )
    untouched = copy.deepcopy(config)
    tuned = get_peft_model(tiny_model(tie_word_embeddings=True), config)
    assert tuned.peft_config["default"].modules_to_save == ["model.embed_tokens"]
    assert config == untouched
    assert config.modules_to_tie is None


def test_a_configuration_made_of_another_shares_nothing_with_it():
    lora = LoraConfig(target_modules=["q_proj"], rank_pattern={"q_proj": 3})
    config = MoDEConfig.from_lora(lora, late_layers=2)
    lora.target_modules.add("v_proj")
    lora.rank_pattern["q_proj"] = 4
    assert config.target_modules == {"q_proj"}
    assert config.rank_pattern == {"q_proj": 3}
    baseline = to_lora(config, tiny_model())
    baseline.rank_pattern["q_proj"] = 5
    assert config.rank_pattern == {"q_proj": 3}


def test_options_changed_after_attach_change_no_model():
    config = MixtureConfig(late_layers=3, router_init="gaussian")
    model = tiny_model()
    mixture = attach(model, config).mixture
    expected = logits(model)
    config.router_temperature, config.late_layers = 5.0, 1
    assert torch.equal(logits(model), expected)
    assert mixture.config.router_temperature == 1.0
    assert active_mixture(model).late_layers == (2, 3, 4)
