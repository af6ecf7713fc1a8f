"""Other PEFT methods over an attached or merged mixture: it stays, or the method is refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    BOFTConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)

import depthmix
from adapters import INPUT_IDS, logits, redrawn, tuned_model
from depthmix import attach, set_top_k
from depthmix.adapters.attached import MoDENorm
from depthmix.method.norm import find_mixture_norm
from models import tiny_model

CAUSAL = {"task_type": "CAUSAL_LM"}
LORA = {"r": 2, "target_modules": ["q_proj"], **CAUSAL}
METHODS = {
    "LoRA": lambda: LoraConfig(**LORA),
    "all linear layers": lambda: LoraConfig(**{**LORA, "target_modules": "all-linear"}),
    "DoRA": lambda: LoraConfig(**LORA, use_dora=True),
    "IA3": lambda: IA3Config(target_modules=["k_proj"], feedforward_modules=[], **CAUSAL),
    "AdaLoRA": lambda: AdaLoraConfig(
        target_modules=["q_proj"], init_r=2, target_r=1, total_step=10, **CAUSAL
    ),
    "LoHa": lambda: LoHaConfig(**LORA),
    "LoKr": lambda: LoKrConfig(**LORA),
    "OFT": lambda: OFTConfig(**{**LORA, "r": 2, "oft_block_size": 0}),
    "BOFT": lambda: BOFTConfig(boft_block_size=4, target_modules=["q_proj"], **CAUSAL),
    "VeRA": lambda: VeraConfig(**LORA),
    "norms": lambda: LNTuningConfig(target_modules=["input_layernorm"], **CAUSAL),
    "tokens": lambda: TrainableTokensConfig(
        token_indices=[5, 6], target_modules=["embed_tokens"], **CAUSAL
    ),
}
"""Methods that are put into the model, each with a start that changes no prediction."""

OUTSIDE = {
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=2, **CAUSAL),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=2, **CAUSAL),
    "adaption prompt": lambda: AdaptionPromptConfig(adapter_len=2, adapter_layers=2, **CAUSAL),
}
"""Methods that PEFT sets without asking any module of the model."""


@pytest.fixture
def merged():
    return tuned_model().merge_and_unload().eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "with_mixture"
    tuned_model().merge_and_unload().save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:The mixture stays frozen")
@pytest.mark.parametrize("way", ["merge_and_unload", "unload"])
@pytest.mark.parametrize("method", METHODS)
def test_a_second_method_merges_and_unloads_and_the_mixture_stays(method, way, merged):
    expected = logits(merged)
    weights = {name: p.clone() for name, p in find_mixture_norm(merged).state_dict().items()}
    second = get_peft_model(merged, METHODS[method]()).eval()
    torch.testing.assert_close(logits(second), expected, rtol=1e-4, atol=1e-4)
    left = getattr(second, way)()
    norm = left.model.norm
    assert isinstance(norm, MoDENorm)
    assert norm.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in norm.state_dict().items())
    torch.testing.assert_close(logits(left), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The mixture stays frozen")
def test_a_second_stage_is_trained_under_the_mixture_and_merged(merged):
    second = redrawn(get_peft_model(merged, METHODS["LoRA"]()), seed=9).eval()
    assert not any("mixture" in n for n, p in second.named_parameters() if p.requires_grad)
    expected = logits(second)
    status = second.get_model_status()
    assert (status.active_adapters, status.enabled) == (["default"], True)
    second.train()(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    left = second.eval().merge_and_unload()
    torch.testing.assert_close(logits(left), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_would_freeze_a_new_mixture_is_refused(method):
    model = tiny_model()
    attach(model, late_layers=2, router_init="gaussian")
    expected, names = logits(model), [name for name, _ in model.named_modules()]
    with pytest.raises(RuntimeError, match=r"would freeze the attached mixture.*use `MoDEConfig`"):
        get_peft_model(model, METHODS[method]())
    assert [name for name, _ in model.named_modules()] == names
    assert all(p.requires_grad for p in find_mixture_norm(model).parameters())
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("method", OUTSIDE)
def test_a_method_outside_the_model_is_refused_in_training_and_saving(method, tmp_path):
    model = tiny_model()
    attach(model, late_layers=2)
    tuned = get_peft_model(model, OUTSIDE[method]())
    with pytest.raises(RuntimeError, match=r"is frozen, has learnt nothing.*use `MoDEConfig`"):
        tuned.train()(input_ids=INPUT_IDS, labels=INPUT_IDS)
    with pytest.raises(RuntimeError, match="cannot be saved alone"):
        tuned.save_pretrained(tmp_path)


def test_a_mixture_that_its_user_froze_stays_frozen_under_lora():
    model = tiny_model()
    attach(model, late_layers=2, router_init="gaussian").requires_grad_(False)
    expected = logits(model)
    with pytest.warns(UserWarning, match="The mixture stays frozen"):
        tuned = get_peft_model(model, METHODS["LoRA"]())
    tuned.train()(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    assert torch.equal(logits(tuned.eval()), expected)


def test_a_mixture_that_was_trained_may_be_frozen():
    model = tiny_model()
    attach(model, late_layers=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.train()(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="The mixture stays frozen"):
        get_peft_model(model, METHODS["LoRA"]())


def test_training_without_peft_is_nobodys_business():
    model = tiny_model().train()
    attach(model, late_layers=2).mixture.requires_grad_(False)
    model(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_an_adapter_whose_base_has_no_mixture_is_not_saved(merged, tmp_path):
    with pytest.warns(UserWarning, match="cannot be saved alone"):
        second = get_peft_model(merged, METHODS["LoRA"]())
    with pytest.raises(RuntimeError, match=r"'default' cannot be saved alone.*\(unnamed\)"):
        second.save_pretrained(tmp_path / "adapter")
    second.merge_and_unload().save_pretrained(tmp_path / "whole")
    assert torch.equal(logits(depthmix.load(tmp_path / "whole").eval()), logits(merged))


@pytest.mark.parametrize("method", ["LoRA", "IA3", "prompt"])
def test_an_adapter_is_saved_over_a_folder_with_the_mixture(method, folder, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The mixture stays frozen")
        tuned = get_peft_model(depthmix.load(folder), (METHODS | OUTSIDE)[method]())
    expected = logits(redrawn(tuned, seed=9).eval())
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(depthmix.load(folder), tmp_path).eval()
    assert torch.equal(logits(loaded), expected)


def test_an_adapter_over_another_mixture_than_its_folders_is_not_saved(folder, tmp_path):
    model = depthmix.load(folder)
    with torch.no_grad():
        find_mixture_norm(model).mixture.router.weight.add_(0.1)
    with pytest.warns(UserWarning, match="The mixture stays frozen"):
        tuned = get_peft_model(model, METHODS["LoRA"]())
    with pytest.raises(RuntimeError, match="has none like it"):
        tuned.save_pretrained(tmp_path)


def test_transformers_own_adapters_are_seen_too(folder, tmp_path):
    model = tiny_model()
    attach(model, late_layers=2)
    with pytest.raises(RuntimeError, match="would freeze the attached mixture"):
        model.add_adapter(METHODS["LoRA"]())
    model = depthmix.load(folder)
    model.add_adapter(METHODS["LoRA"]())
    model.save_pretrained(tmp_path)
    expected = logits(model.eval())
    model = depthmix.load(folder)
    model.load_adapter(tmp_path)
    assert torch.equal(logits(model.eval()), expected)


def test_the_final_norm_cannot_be_saved_without_its_model(folder):
    message = "cannot be copied without its model.*`modules_to_save=\\['mixture'\\]`"
    for config in (
        LoraConfig(**LORA, modules_to_save=["model.norm"]),
        LNTuningConfig(target_modules=["norm"], **CAUSAL),
    ):
        with pytest.raises(TypeError, match=message):
            get_peft_model(depthmix.load(folder), config)


def test_a_part_of_a_model_is_copied_with_the_rest():
    model = tiny_model()
    attach(model, late_layers=2, router_init="gaussian")
    for norm in (find_mixture_norm(copy.deepcopy(model.model)), copy.deepcopy(model).model.norm):
        assert norm.backbone.final_norm is norm
        assert norm.witness.norm is norm
        assert torch.equal(logits(norm.backbone.model), logits(model))
    with pytest.raises(TypeError, match="cannot be copied without its model"):
        copy.deepcopy(model.model.norm)


def test_the_mixture_of_a_loaded_model_is_trained_and_saved_by_name(folder, tmp_path):
    model = depthmix.load(folder)
    before = logits(model.eval())
    tuned = get_peft_model(model, LoraConfig(**LORA, modules_to_save=["mixture"]))
    assert torch.equal(logits(tuned), before)
    tuned.train()(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    trained = {n for n, p in tuned.named_parameters() if p.grad is not None and "mixture" in n}
    assert len(trained) == 3
    expected = logits(redrawn(tuned, seed=9).eval())
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned), before)
    set_top_k(tuned, 1)
    assert not torch.allclose(logits(tuned), expected, atol=1e-3)
    set_top_k(tuned, None)
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(depthmix.load(folder), tmp_path).eval()
    assert torch.equal(logits(loaded), expected)
    left = loaded.merge_and_unload()
    torch.testing.assert_close(logits(left), expected, rtol=1e-4, atol=1e-4)
