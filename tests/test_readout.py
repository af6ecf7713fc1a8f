"""One layer that predicts alone, against the logit lens written out."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from adapters import tuned_model
from depthmix.adapters.readout import reading_out
from depthmix.method.norm import find_mixture_norm
from models import random_ids, randomise, tiny_model

IDS = random_ids(2, 6)


def hidden_states(model):
    """Residual streams before the final norm, by layer."""
    found = {}
    handles = [
        layer.register_forward_hook(
            lambda _m, _a, output, i=i: found.__setitem__(
                i, output[0] if isinstance(output, tuple) else output
            )
        )
        for i, layer in enumerate(model.model.layers, start=1)
    ]
    with torch.no_grad():
        model(input_ids=IDS)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
@pytest.mark.parametrize("layer", [1, 2, 3, 4, "final"])
def test_a_plain_model_answers_by_the_logit_lens(model_type, layer):
    model = tiny_model(model_type)
    before = model(input_ids=IDS).logits
    state = hidden_states(model)[4 if layer == "final" else layer]
    expected = model.lm_head(model.model.norm(state))
    with reading_out(model, layer), torch.no_grad():
        found = model(input_ids=IDS).logits
    torch.testing.assert_close(found, expected)
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert find_mixture_norm(model) is None


@pytest.mark.parametrize("layer", [2, 3, 4, "final"])
def test_a_late_layer_answers_with_its_own_norm(layer):
    tuned = tuned_model(late_layers=3)
    randomise(tuned, only_trainable=True)
    base = tuned.get_base_model()
    before = tuned(input_ids=IDS).logits
    state = hidden_states(base)[4 if layer == "final" else layer]
    norm = find_mixture_norm(tuned)
    own = norm.active_mixture.norms.get_submodule(str(layer)) if layer in (2, 3) else None
    expected = base.lm_head((own or norm.base_layer)(state))
    with reading_out(tuned, layer), torch.no_grad():
        found = tuned(input_ids=IDS).logits
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, before)
    assert torch.equal(tuned(input_ids=IDS).logits, before)


def test_the_ensemble_is_the_model_itself():
    tuned = tuned_model(late_layers=3)
    expected = tuned(input_ids=IDS).logits
    with reading_out(tuned, "ensemble"):
        assert torch.equal(tuned(input_ids=IDS).logits, expected)


def test_a_plain_adapter_stays_active():
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    randomise(model, only_trainable=True)
    with reading_out(model, 2), torch.no_grad():
        adapted = model(input_ids=IDS).logits
        with model.disable_adapter():
            assert not torch.allclose(model(input_ids=IDS).logits, adapted)


@pytest.mark.parametrize(
    ("model", "layer", "message"),
    [
        (lambda: tuned_model(late_layers=2), 2, r"late layers 3, 4 \(or `final` or `ensemble`\)"),
        (tiny_model, 5, "between 1 and 4"),
        (tiny_model, 0, "between 1 and 4"),
    ],
)
def test_other_layers_are_refused(model, layer, message):
    with pytest.raises(ValueError, match=message), reading_out(model(), layer):
        pass
