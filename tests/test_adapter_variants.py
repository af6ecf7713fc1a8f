"""Adapters: LoRA's starts and their conversion on saving, its variants, PEFT's optimizers."""

from __future__ import annotations

import pytest
import torch
from peft import (
    EvaConfig,
    LoraGAConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.tuners.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    KasaConfig,
    MontecloraConfig,
    VeloraConfig,
)
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.tuners.lora.loraga import preprocess_loraga
from peft.utils.hotswap import hotswap_adapter

from adapters import INPUT_IDS, OPTIONS, logits, redrawn, tuned_model
from depthmix import MoDEConfig
from models import random_ids, tiny_model


def made(model, **options):
    return get_peft_model(model, MoDEConfig(**{**OPTIONS, **options}))


def made_by_eva():
    tuned = made(tiny_model(), init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    batches = [{"input_ids": random_ids(4, 7, seed=seed)} for seed in range(6)]
    before = {n: p.clone() for n, p in tuned.named_parameters() if "lora_A" in n}
    initialize_lora_eva_weights(tuned, batches, show_progress_bar=False)
    after = dict(tuned.named_parameters())
    assert not any(torch.equal(after[name], value) for name, value in before.items())
    return tuned


def made_by_corda():
    model = tiny_model()
    options = {"init_lora_weights": "corda", "corda_config": CordaConfig()}
    config = MoDEConfig(**OPTIONS, **options)

    @torch.no_grad()
    def run_model():
        for row in random_ids(20, 1, 7):
            model(row)

    preprocess_corda(model, config, run_model=run_model)
    return get_peft_model(model, config)


def made_by_lora_ga():
    model, input_ids = tiny_model(), random_ids(4, 7)
    options = {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}
    config = MoDEConfig(**OPTIONS, **options)
    preprocess_loraga(model, config, lambda: model(input_ids, labels=input_ids).loss.backward())
    return get_peft_model(model, config)


STARTS = {
    "plain": lambda: made(tiny_model()),
    "gaussian": lambda: made(tiny_model(), init_lora_weights="gaussian"),
    "orthogonal": lambda: made(tiny_model(), init_lora_weights="orthogonal"),
    "MiCA": lambda: made(tiny_model(), init_lora_weights="mica"),
    "PiSSA": lambda: made(tiny_model(), init_lora_weights="pissa"),
    "PiSSA, fast": lambda: made(tiny_model(), init_lora_weights="pissa_niter_4"),
    "PiSSA, rsLoRA": lambda: made(tiny_model(), init_lora_weights="pissa", use_rslora=True),
    "PiSSA, ranks": lambda: made(
        tiny_model(), init_lora_weights="pissa", rank_pattern={"up_proj": 3}
    ),
    "OLoRA": lambda: made(tiny_model(), init_lora_weights="olora"),
    "EVA": made_by_eva,
    "CorDA": made_by_corda,
    "LoRA-GA": made_by_lora_ga,
}


@pytest.mark.parametrize("start", STARTS)
def test_an_adapter_is_converted_to_plain_lora_on_saving(start, tmp_path):
    tuned = STARTS[start]()
    tuned.save_pretrained(tmp_path / "start")
    expected = logits(redrawn(tuned, seed=5).eval())
    converted, initial = tmp_path / "converted", str(tmp_path / "start")
    tuned.save_pretrained(converted, path_initial_model_for_weight_conversion=initial)
    assert torch.equal(logits(tuned), expected)
    assert (list(tuned.peft_config), tuned.active_adapter) == (["default"], "default")
    loaded = PeftModel.from_pretrained(tiny_model(), converted).eval()
    assert loaded.peft_config["default"].init_lora_weights is True
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-3, atol=1e-3)
    unloaded = loaded.unload()
    assert torch.equal(logits(unloaded), logits(tiny_model()))


@pytest.mark.parametrize("start", ["PiSSA", "OLoRA", "PiSSA, rsLoRA"])
def test_an_adapter_is_loaded_with_its_start(start, tmp_path):
    tuned = redrawn(STARTS[start](), seed=5).eval()
    expected = logits(tuned)
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "lost"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"lora_bias": True}, "lora_B.bias"),
        ({"kasa_config": KasaConfig()}, "lora_diag"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"trainable_token_indices": [5, 6]}, "token_adapter"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
        ({"bias": "all"}, "biases"),
    ],
)
def test_a_conversion_that_would_lose_a_part_is_refused(options, lost, tmp_path):
    tuned = redrawn(made(tiny_model(), **options), seed=5).eval()
    expected = logits(tuned)
    tuned.save_pretrained(tmp_path / "start")
    initial = str(tmp_path / "start")
    with pytest.raises(ValueError, match=rf"the adapter has more \(.*{lost}"):
        tuned.save_pretrained(tmp_path / "to", path_initial_model_for_weight_conversion=initial)
    assert torch.equal(logits(tuned), expected)
    assert not list((tmp_path / "to").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("folder", "options", "message"),
    [
        ("default", {}, "called like no adapter of the model.*'default'"),
        (".", {}, "called like no adapter of the model.*''"),
        ("start", {"init_lora_weights": False}, "whose start is the pretrained model"),
    ],
)
def test_a_conversion_that_would_be_another_model_is_refused(
    folder, options, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    tuned = made(tiny_model(), **options)
    tuned.save_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        tuned.save_pretrained("to", path_initial_model_for_weight_conversion=folder)
    assert list(tuned.peft_config) == ["default"]


@pytest.mark.parametrize(
    "options",
    [
        {"lora_bias": True, "target_modules": ["fc1"]},
        {"bias": "all", "target_modules": ["fc1"]},
        {"bias": "lora_only", "target_modules": ["fc1"]},
        {"kasa_config": KasaConfig(), "target_modules": ["fc1"]},
        {"monteclora_config": MontecloraConfig(), "target_modules": ["fc1"]},
        {"velora_config": VeloraConfig(num_groups=4), "target_modules": ["fc1"]},
        {"use_bdlora": BdLoraConfig(target_modules_bd_a=["fc1"], nblocks=2)}
        | {"target_modules": ["fc1"]},
        {"trainable_token_indices": [5, 6], "target_modules": ["fc1"]},
        {"target_modules": ["embed_tokens", "fc1"]},
        {"exclude_modules": ["fc1"], "target_modules": ["fc1", "fc2"]},
    ],
    ids=lambda options: " ".join(options),
)
def test_lora_variants_are_trained_saved_loaded_and_merged(options, tmp_path):
    model = tiny_model("phi", tie_word_embeddings=False)
    tuned = made(model, **options).train()
    tuned(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    final_norm = tuned.base_model.model.model.final_layernorm.base_layer
    assert final_norm.bias.requires_grad == (options.get("bias") == "all")
    assert not final_norm.weight.requires_grad
    expected = logits(redrawn(tuned, seed=5).eval())
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("phi", tie_word_embeddings=False), tmp_path)
    torch.testing.assert_close(logits(loaded.eval()), expected, rtol=1e-5, atol=1e-5)
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)


def test_alora_acts_after_its_invocation_alone():
    input_ids = torch.tensor([[9, 8, 5, 6, 7, 10]])
    tuned = tuned_model(alora_invocation_tokens=[5, 6])
    invoked = logits(tuned, input_ids)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    without = logits(tuned, input_ids)
    assert torch.equal(invoked[:, :2], without[:, :2])
    assert not torch.allclose(invoked[:, 2:], without[:, 2:], atol=1e-2)
    with pytest.raises(NotImplementedError, match="does not support merging"):
        tuned.merge_and_unload()
    assert torch.equal(logits(tuned, input_ids), without)


def test_arrow_is_refused():
    with pytest.raises(ValueError, match="`arrow_config` runs several adapters at once"):
        MoDEConfig(**OPTIONS, arrow_config=ArrowConfig())


@pytest.mark.parametrize("options", [{}, {"train_late_norms": False}])
def test_lora_fa_is_refused(options):
    with pytest.raises(ValueError, match="LoRA-FA takes all parameters of an adapter for pairs"):
        create_lorafa_optimizer(tuned_model(**options), r=2, lora_alpha=8, lr=1e-3)


def test_lora_plus_trains_every_parameter():
    tuned = tuned_model().train()
    optimizer = create_loraplus_optimizer(tuned, torch.optim.SGD, lr=1e-3, loraplus_lr_ratio=16)
    before = {name: p.detach().clone() for name, p in tuned.named_parameters()}
    tuned(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    optimizer.step()
    trained = {name for name, p in tuned.named_parameters() if not torch.equal(p, before[name])}
    assert trained == {name for name, p in tuned.named_parameters() if p.requires_grad}
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    mixture = tuned.base_model.model.model.norm.active_mixture
    assert rates[id(mixture.router.weight)] == 1e-3
    assert rates[id(mixture.norms["2"].weight)] == pytest.approx(16e-3)


def test_pefts_helpers_work():
    tuned = tuned_model()
    expected = logits(tuned)
    with rescale_adapter_scale(tuned, 0.5):
        assert not torch.allclose(logits(tuned), expected, atol=1e-2)
    with disable_input_dtype_casting(tuned):
        assert torch.equal(logits(tuned), expected)
    assert torch.equal(logits(tuned), expected)
    tuned.set_requires_grad("default", requires_grad=False)
    assert not any(p.requires_grad for p in tuned.parameters())
    tuned.set_requires_grad("default")
    assert tuned.get_model_status().requires_grad == {"default": True}


def test_what_knows_lora_alone_is_refused(tmp_path):
    tuned = tuned_model()
    tuned.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA"):
        hotswap_adapter(tuned, tmp_path, "default")
    with pytest.raises(TypeError, match=r"do not support LoRA conversion.*MoDELayer"):
        convert_to_lora(tuned, rank=2)
    with pytest.raises(ValueError, match="not using LoRA"):
        reduce_intruder_dimension(tuned)
    with pytest.raises(ValueError, match="'MODE_LORA' is not compatible with the `PeftMixedModel`"):
        get_peft_model(tiny_model(), MoDEConfig(**OPTIONS), mixed=True)
