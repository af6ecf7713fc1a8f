"""The mixture in the final norm's place: routing, mixing, starting points, and what it costs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from depthmix import MixtureConfig, MoDEConfig, attach, detach, parameter_ledger
from depthmix.adapters.baseline import to_lora
from depthmix.method.mixture import mix, route
from models import random_ids, randomise, tiny_model

INPUT_IDS = random_ids(2, 7)


@torch.no_grad()
def logits(model):
    return model(INPUT_IDS).logits


def attached(model_type="llama", **options):
    """Attach a mixture with random weights; give the model and the module in the norm's place."""
    model = tiny_model(model_type)
    norm = attach(model, **{"router_init": "gaussian", **options})
    randomise(norm.mixture, seed=3)
    return model, norm


def hidden_states(model):
    """Collect the residual stream after the embeddings and after each layer."""
    states = [model.get_input_embeddings()(INPUT_IDS)]
    handles = [
        layer.register_forward_hook(lambda _module, _args, out: states.append(out))
        for layer in model.model.layers
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    return states


# Routing and mixing, as functions.

ROUTER_LOGITS = st.lists(
    st.lists(st.floats(-50, 50, width=32), min_size=4, max_size=4), min_size=1, max_size=5
).map(torch.tensor)
TEMPERATURE = st.floats(0.1, 10)


@given(ROUTER_LOGITS, st.sampled_from([None, 1, 2, 3, 4]), TEMPERATURE)
def test_weights_sum_to_one_over_the_kept_routes(router_logits, top_k, temperature):
    weights = route(router_logits, top_k=top_k, temperature=temperature)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights)))
    scaled = router_logits / temperature  # may make equal what was not
    for given_row, row in zip(scaled.double().tolist(), weights.tolist(), strict=True):
        kept = sorted(range(4), key=lambda i, given_row=given_row: -given_row[i])[: top_k or 4]
        if len({given_row[i] for i in range(4)}) < 4:
            continue  # among equal logits any choice is right
        top = max(given_row)
        scores = {i: math.exp(given_row[i] - top) for i in kept}
        expected = [scores.get(i, 0.0) / sum(scores.values()) for i in range(4)]
        assert row == pytest.approx(expected, abs=1e-5)
        assert all(row[i] == 0 for i in set(range(4)) - set(kept))


@given(st.integers(0, 2**32), st.permutations(range(4)))
def test_mixture_does_not_depend_on_the_order_of_routes(seed, order):
    generator = torch.Generator().manual_seed(seed)
    states = tuple(torch.randn(2, 3, 8, generator=generator) for _ in range(4))
    weights = torch.randn(2, 3, 4, generator=generator).softmax(-1)
    mixed = mix(states, weights)
    truth = sum(weights[..., i, None].double() * state.double() for i, state in enumerate(states))
    torch.testing.assert_close(mixed.double(), truth, rtol=1e-5, atol=1e-6)
    permuted = mix(tuple(states[i] for i in order), weights[..., list(order)])
    torch.testing.assert_close(permuted, mixed, rtol=1e-5, atol=1e-6)


# The module in its place.


def test_one_layer_is_the_base_model():
    model = tiny_model()
    plain = logits(model)
    attach(model, late_layers=1)
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("train_final_norm", [False, True])
def test_identity_start_is_nearly_the_base_model(temperature, train_final_norm):
    model = tiny_model()
    plain = logits(model)
    norm = attach(
        model,
        late_layers=3,
        router_init="identity",
        router_temperature=temperature,
        train_final_norm=train_final_norm,
    )
    weights = norm.mixture.weigh(torch.randn(2, 7, 16))
    torch.testing.assert_close(weights[..., 2], torch.full((2, 7), 0.99))
    torch.testing.assert_close(weights[..., 0], torch.full((2, 7), 0.005))
    norm.mixture.weigh = lambda _x: torch.tensor([0.5, 0.5, 0.0]).expand(2, 7, 3)
    others = logits(model)
    del norm.mixture.weigh
    torch.testing.assert_close(logits(model), 0.99 * plain + 0.01 * others, rtol=1e-4, atol=1e-4)


def test_gaussian_start_follows_the_paper():
    torch.manual_seed(0)
    model = tiny_model(hidden_size=512, head_dim=256)
    router = attach(model, late_layers=4, router_init="gaussian").mixture.router
    assert router.bias is None
    assert float(router.weight.std()) == pytest.approx(0.02, rel=0.05)
    assert float(router.weight.mean()) == pytest.approx(0, abs=0.002)


def test_router_reads_the_stream_below_the_first_late_layer():
    model, norm = attached(late_layers=[2, 4], router_temperature=2.0, router_input="raw")
    states = hidden_states(model)
    seen = []
    weigh = norm.mixture.weigh
    norm.mixture.weigh = lambda x: seen.append(weigh(x)) or seen[-1]
    logits(model)
    expected = (states[1] @ norm.mixture.router.weight.T / 2).softmax(-1)
    torch.testing.assert_close(seen[0], expected)


def test_normed_router_input_has_no_scale():
    _, norm = attached(late_layers=3, router_input="normed")
    x = torch.randn(2, 7, 16)
    weights = norm.mixture.weigh(x)
    rms = x.square().mean(-1, keepdim=True).sqrt()
    expected = (x / rms @ norm.mixture.router.weight.T).softmax(-1)
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.mixture.weigh(1000 * x), weights, rtol=1e-4, atol=1e-5)


def test_routing_is_float32_under_autocast():
    _, norm = attached(late_layers=3)
    x = torch.randn(2, 7, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm.mixture.weigh(x), norm.mixture.weigh(x.clone()))
        inside = norm.mixture.weigh(x)
    assert torch.equal(inside, norm.mixture.weigh(x))


def test_one_kept_route_is_that_layers_prediction():
    model, norm = attached(late_layers=3, top_k=1)
    states = hidden_states(model)
    choice = (states[1] @ norm.mixture.router.weight.T).argmax(-1)
    assert len(choice.unique()) > 1
    own = [norm.mixture.norms["2"], norm.mixture.norms["3"], norm.base_layer]
    lens = torch.stack([model.lm_head(n(h)) for n, h in zip(own, states[2:], strict=True)], 2)
    expected = lens.gather(2, choice[..., None, None].expand(2, 7, 1, 61))[:, :, 0]
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("model_type", ["llama", "opt", "gemma2"])
def test_bfloat16_model_keeps_its_dtype(model_type):
    model = tiny_model(model_type, initializer_range=0.1)
    norm = attach(model, late_layers=3)
    expected = logits(model)
    model.to(torch.bfloat16)
    norm.mixture.float()
    found = logits(model)
    assert found.dtype == torch.bfloat16
    error = (found.float() - expected).abs().mean() / expected.abs().mean()
    assert error < 0.05


@pytest.mark.parametrize("exit_layer", [1, 2, 3])
def test_stopped_loop_answers_with_the_norm_of_the_layer_it_stopped_at(exit_layer):
    model, norm = attached(late_layers=3)
    state = hidden_states(model)[exit_layer]
    own = {2: norm.mixture.norms["2"], 3: norm.mixture.norms["3"]}.get(exit_layer, norm.base_layer)
    model.config.num_hidden_layers = exit_layer
    torch.testing.assert_close(logits(model), model.lm_head(own(state)))
    model.train()
    with pytest.raises(RuntimeError, match="hidden states of the mixture were seen"):
        model(INPUT_IDS)
    model.eval().config.num_hidden_layers = 4
    assert torch.equal(logits(model), logits(attached(late_layers=3)[0]))


# Attaching.


def test_detached_model_is_the_base_model():
    model = tiny_model()
    plain, weights = logits(model), dict(model.state_dict())
    norm = attach(model, late_layers=3)
    randomise(norm.mixture, seed=3)
    assert not torch.allclose(logits(model), plain, atol=1e-2)
    assert detach(model) is norm.mixture
    assert torch.equal(logits(model), plain)
    assert list(model.state_dict()) == list(weights)
    assert all(
        value is weights[name] or torch.equal(value, weights[name])
        for name, value in model.state_dict().items()
    )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(RuntimeError, match="has no attached mixture"):
        detach(model)


def test_attaching_is_refused_where_it_makes_no_sense():
    model = tiny_model()
    with pytest.raises(TypeError, match="`config` and the options late_layers cannot both"):
        attach(model, MixtureConfig(), late_layers=2)
    attach(model, late_layers=2)
    with pytest.raises(RuntimeError, match="`model` has a mixture already"):
        attach(model, late_layers=2)
    tuned = get_peft_model(tiny_model(), MoDEConfig(target_modules=["q_proj"]))
    with pytest.raises(RuntimeError, match="a PEFT adapter is removed by `unload"):
        detach(tuned.get_base_model())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"late_layers": 0}, ValueError, "must be at least 1 .*, got 0"),
        (
            {"late_layers": True},
            TypeError,
            "must be int or list.* or .auto., got True, which is bool",
        ),
        ({"late_layers": []}, ValueError, r"increasing list .*, got \[\]"),
        ({"late_layers": [3, 2]}, ValueError, r"increasing list .*, got \[3, 2\]"),
        ({"late_layers": [0, 4]}, ValueError, r"increasing list .*, got \[0, 4\]"),
        ({"late_layers": [2, 3]}, ValueError, r"final layer, which is 4 .*, got \[2, 3\]"),
        ({"late_layers": 5}, ValueError, "between 1 and 4 .*, got 5"),
        ({"top_k": 4}, ValueError, "between 1 and the 3 routes of `late_layers`, got 4"),
        ({"top_k": 0}, ValueError, "between 1 and the 3 routes of `late_layers`, got 0"),
        ({"router_temperature": 0.0}, ValueError, "`router_temperature` must be a positive"),
        ({"router_temperature": float("nan")}, ValueError, "a positive number, got nan"),
        ({"distillation_weight": -1.0}, ValueError, "a number of at least 0, got -1"),
        ({"distillation_weight": float("nan")}, ValueError, "a number of at least 0, got nan"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        attach(tiny_model(), **options)


# The ledger, on the shapes of LLaMA-7B (the paper's numbers).


def ledger_of_llama_7b(**options):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig())
        return parameter_ledger(get_peft_model(model, MoDEConfig.from_preset("paper", **options)))


def test_ledger_has_the_papers_numbers():
    ledger = ledger_of_llama_7b()
    assert ledger.lora_below == 50_839_552
    assert (ledger.lora_late, ledger.other) == (0, 0)
    assert (ledger.norms, ledger.router) == (2 * 4096, 3 * 4096)
    assert ledger.total == 50_839_552 + 20_480
    assert ledger.model == 6_738_415_616
    everything = ledger_of_llama_7b(adapt="all")
    assert everything.lora_below == 50_839_552
    assert everything.lora_late == 5_259_264 == 3 * 1_753_088
    assert everything.lora_below + everything.lora_late == 56_098_816
    assert "10.34 %" in str(everything)
    assert "late norms" in str(everything)


def test_ledger_of_plain_lora_needs_to_be_told_the_late_layers():
    config = MoDEConfig(target_modules=["q_proj"], r=2, late_layers=3, adapt="all")
    plain = get_peft_model(tiny_model(), to_lora(config, tiny_model()))
    assert (parameter_ledger(plain).lora_below, parameter_ledger(plain).lora_late) == (256, 0)
    told = parameter_ledger(plain, first_late_layer=2)
    assert (told.lora_below, told.lora_late, told.norms) == (64, 192, 0)
    assert told.total == 256
