"""Every architecture: the mixture against the paper read literally, one layer at a time."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from depthmix import MoDEConfig, attach, detach, find_backbone
from depthmix.method.norm import find_mixture_norm
from models import ARCHITECTURES, random_ids, randomise, tiny_model
from references import route

INPUT_IDS = random_ids(2, 7)


def hidden_states_before_norm(model, input_ids):
    """Collect each layer's own output with plain hooks, independently of the library."""
    backbone, states = find_backbone(model), [model.get_input_embeddings()(input_ids)]
    keep = lambda _module, _args, out: states.append(out[0] if isinstance(out, tuple) else out)  # noqa: E731
    handles = [layer.register_forward_hook(keep) for layer in backbone.layers]
    with torch.no_grad():
        logits = model(input_ids).logits
    for handle in handles:
        handle.remove()
    return states, logits


def naive_logits(model, states, *, norms, mixture):
    """Compute the paper's ensemble: k head products, each with its own norm, then the cap."""
    backbone = find_backbone(model, try_out=False)
    weights = route(states[mixture.late_layers[0] - 1], mixture).float()
    raw = [backbone.project(norms[i](states[i])) for i in mixture.late_layers]
    return backbone.cap(sum(weights[..., i, None] * part for i, part in enumerate(raw)))


@pytest.mark.parametrize("router_input", ["raw", "normed"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_mixture_is_the_sum_of_the_layers_logits(model_type, router_input):
    model = tiny_model(model_type)
    states, logits = hidden_states_before_norm(model, INPUT_IDS)
    norm = attach(model, late_layers=3, router_input=router_input)
    randomise(norm.mixture, seed=3)
    norms = {**{int(i): m for i, m in norm.mixture.norms.items()}, 4: norm.base_layer}
    with torch.no_grad():
        mixed = model(INPUT_IDS).logits
        mixture = detach(model)
        expected = naive_logits(model, states, norms=norms, mixture=mixture)
    assert (mixed - logits).abs().max() > 1e-2
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-4)
    assert find_mixture_norm(model) is None


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_one_hot_routing_is_that_layers_logit_lens(model_type):
    model = tiny_model(model_type)
    states, logits = hidden_states_before_norm(model, INPUT_IDS)
    backbone = find_backbone(model)
    lens = {i: backbone.unembed(backbone.final_norm(states[i])) for i in (2, 3)}
    norm = attach(model, late_layers=3, train_late_norms=False)
    with torch.no_grad():
        for route, expected in enumerate([lens[2], lens[3], logits]):
            one_hot = torch.zeros(2, 7, 3)
            one_hot[..., route] = 1.0
            norm.mixture.weigh = lambda _x, weights=one_hot: weights
            torch.testing.assert_close(model(INPUT_IDS).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_disabled_is_the_base_model_and_saved_is_the_same(model_type, tmp_path):
    model = tiny_model(model_type)
    with torch.no_grad():
        logits = model(INPUT_IDS).logits
    tuned = get_peft_model(
        model, MoDEConfig(target_modules="all-linear", r=2, late_layers=2, adapt="below")
    ).eval()
    randomise(tuned, seed=5, only_trainable=True)
    with torch.no_grad():
        expected = tuned(INPUT_IDS).logits
        assert (expected - logits).abs().max() > 1e-2
        with tuned.disable_adapter():
            assert torch.equal(tuned(INPUT_IDS).logits, logits)
        tuned.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_model(model_type), tmp_path).eval()
        assert torch.equal(loaded(INPUT_IDS).logits, expected)


def test_opt_without_a_final_norm_is_refused():
    model = tiny_model("opt", do_layer_norm_before=False)
    with pytest.raises(ValueError, match="Cannot find the final norm of OPTForCausalLM"):
        attach(model, late_layers=2)


def test_post_norm_model_is_refused():
    model = tiny_model("openai-gpt", n_embd=16, n_layer=4, n_head=2, n_positions=64)
    with pytest.raises(ValueError, match="Cannot find the final norm of OpenAIGPTLMHeadModel"):
        attach(model, late_layers=2)


def test_encoders_are_refused():
    bert = BertForMaskedLM(BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2))
    with pytest.raises(TypeError, match="BertForMaskedLM cannot generate"):
        attach(bert, late_layers=1)
    t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, num_layers=2, num_heads=2))
    with pytest.raises(TypeError, match="T5ForConditionalGeneration is an encoder-decoder"):
        get_peft_model(t5, MoDEConfig(target_modules=["q"], late_layers=1))


def test_names_can_be_given():
    model = tiny_model("llama")
    found = find_backbone(model, final_norm="model.norm", decoder_layers="model.layers")
    assert found == find_backbone(model)
    with pytest.raises(ValueError, match="`final_norm` must name a module"):
        find_backbone(model, final_norm="model.no_such_norm")
    with pytest.raises(ValueError, match=r"does not pass the output of each layer"):
        find_backbone(model, final_norm="model.layers.0.input_layernorm")


@pytest.mark.parametrize("cap", [2.0, 30.0])
def test_a_soft_cap_by_another_name_is_found(cap):
    options = {"lru_width": 16, "attention_window_size": 8, "logits_soft_cap": cap}
    model = tiny_model("recurrent_gemma", block_types=["recurrent", "attention"], **options)
    assert find_backbone(model).soft_cap == cap
    attach(model, late_layers=2)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # beyond the cap
    labels = random_ids(1, 7)
    evaluated = model.eval()(labels, labels=labels).loss
    trained = model.train()(labels, labels=labels).loss
    norm = detach(model)
    assert norm.config.distils
    assert trained > evaluated  # by the distillation, and no more than that
    attach(model, late_layers=2, distillation_weight=0.0)
    model.train()
    torch.testing.assert_close(model(labels, labels=labels).loss, evaluated, rtol=1e-4, atol=1e-4)


def test_a_cap_that_small_logits_do_not_show_is_refused(monkeypatch):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)
    forward = type(model).forward

    def capped(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output

    assert find_backbone(model).soft_cap is None
    monkeypatch.setattr(type(model), "forward", capped)
    with pytest.raises(ValueError, match="logits of LlamaForCausalLM are not its head applied"):
        find_backbone(model)
