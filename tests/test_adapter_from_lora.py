"""A mixture on top of a finished LoRA adapter."""

from __future__ import annotations

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file

from adapters import INPUT_IDS, OPTIONS, logits, redrawn, tuned_model
from depthmix import MoDEConfig
from models import tiny_model

LORA = {"r": 2, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}


def finish(folder, **options):
    """Train a LoRA adapter, so to say, and save it."""
    plain = redrawn(get_peft_model(tiny_model(), LoraConfig(**LORA, **options)), seed=4).eval()
    plain.save_pretrained(folder)
    return plain


def put_on_top(folder, **options):
    config = MoDEConfig.from_adapter(folder, **options)
    return PeftModel.from_pretrained(tiny_model(), folder, config=config, is_trainable=True)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"modules_to_save": ["lm_head"]}],
    ids=lambda options: " ".join(options) or "plain",
)
def test_lora_is_as_it_was_and_the_mixture_is_new(options, tmp_path):
    plain = finish(tmp_path / "lora", **options)
    tuned = put_on_top(tmp_path / "lora", late_layers=1).eval()  # the final layer alone
    torch.testing.assert_close(logits(tuned), logits(plain), rtol=1e-5, atol=1e-5)
    expected = get_peft_model_state_dict(plain)
    found = {n: v for n, v in get_peft_model_state_dict(tuned).items() if "lora_mode" not in n}
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_both_are_trained_and_saved_together(tmp_path):
    finish(tmp_path / "lora")
    tuned = put_on_top(tmp_path / "lora", late_layers=3, router_init="gaussian").train()
    tuned(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    trained = {name for name, p in tuned.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert sum("lora_mode" in name for name in trained) == 3
    assert sum("lora_A" in name for name in trained) == 2 * 4  # in all layers, as it was
    expected = logits(redrawn(tuned, seed=6).eval())
    tuned.save_pretrained(tmp_path / "both")
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "both").eval()
    assert torch.equal(logits(loaded), expected)


def test_a_lora_file_in_a_mixtures_place_is_named(tmp_path):
    finish(tmp_path)
    model = get_peft_model(tiny_model(), MoDEConfig.from_lora(LoraConfig(**LORA), late_layers=2))
    with pytest.raises(ValueError, match=r"plain LoRA adapter's.*`PeftModel.from_pretrained\(base"):
        set_peft_model_state_dict(model, load_file(tmp_path / "adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"adapt": "below", "late_layers": 2}, "holds 8 tensors that its settings do not use")],
)
def test_lora_weights_are_never_lost(options, message, tmp_path):
    finish(tmp_path)
    with pytest.raises(ValueError, match=message):
        put_on_top(tmp_path, **options)


def test_values_are_needed_to_start_from(tmp_path):
    finish(tmp_path)
    config = MoDEConfig.from_adapter(tmp_path)
    with pytest.raises(ValueError, match="`low_cpu_mem_usage` gives a new mixture"):
        PeftModel.from_pretrained(tiny_model(), tmp_path, config=config, low_cpu_mem_usage=True)


def test_other_adapters_are_refused(tmp_path):
    tuned_model(**OPTIONS).save_pretrained(tmp_path / "mixture")
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    get_peft_model(tiny_model(), config).save_pretrained(tmp_path / "ia3")
    for name in ("mixture", "ia3"):
        with pytest.raises(ValueError, match="`adapter` must be a plain LoRA adapter"):
            MoDEConfig.from_adapter(tmp_path / name)
