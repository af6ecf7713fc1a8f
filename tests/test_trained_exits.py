"""Exits trained together with the trunk: what they learn, leave alone and are saved in."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model

from adapters import tuned_model as tuned_adapter
from depthmix import (
    MixtureConfig,
    MoDEConfig,
    attach,
    detach,
    load,
    parameter_ledger,
    to_lora,
)
from depthmix.adapters.attach import CONFIG_FIELD
from depthmix.libraries.releases import CHECKPOINTING
from depthmix.method.found_exits import find_exits
from depthmix.method.norm import active_mixture, find_mixture_norm
from models import random_ids, randomise, tiny_model
from test_training import (
    tuned_model,
)

IDS = random_ids(3, 7)
BATCH = {"input_ids": IDS, "labels": IDS}
EXITS = {"exits": [1, 3], "exit_rank": 3, "exit_weight": 0.7}
EXITS |= {"exit_distillation": 0.3, "exit_vocabulary": 20}


# A training pass.


def with_exits(model=None, *, seed=2, **options):
    """Attach a mixture with random weights and exits to a tiny model."""
    model = model or tiny_model(tie_word_embeddings=False)
    norm = attach(model, **{**EXITS, "late_layers": 2, "distillation_weight": 0.3, **options})
    randomise(norm.mixture, seed=seed, only_trainable=True)
    return model


def gradients_of(model, **batch):
    model.zero_grad()
    torch.manual_seed(0)  # of the dropout that some models have
    loss = model(**batch).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


@pytest.mark.parametrize("kappa", [0.0, 0.4])
@pytest.mark.parametrize(
    "model_type", ["llama", "gemma2", "cohere", "granite", "opt", "phi", "gpt2", "gpt_oss"]
)
def test_the_trunk_gets_the_gradient_of_the_objective_by_hand(model_type, kappa):
    model = tiny_model(model_type, output_router_logits=False)
    with_exits(model, exit_distillation=kappa, exit_vocabulary=None).train()
    model.get_output_embeddings().requires_grad_(False)
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0  # left padding
    batch = {"input_ids": IDS, "attention_mask": mask, "labels": IDS.masked_fill(mask == 0, -100)}
    loss, found = gradients_of(model, **batch)

    mixture, backbone = active_mixture(model), find_mixture_norm(model).backbone
    exits, mixture.exits = mixture.exits, None  # nothing but the loss knows of them
    expected_loss, expected = gradients_of(model, **batch)
    model.zero_grad()
    exits.zero_grad()
    torch.manual_seed(0)
    output = model(**batch, mixture_loss=False, output_hidden_states=True)
    counted = batch["labels"][:, 1:] != -100
    targets, teacher = IDS[:, 1:][counted], output.logits[:, :-1][counted].detach().softmax(-1)
    losses = []
    for layer in exits.layers:
        logits = backbone.unembed(exits(layer, output.hidden_states[layer][:, :-1][counted]))
        log_probs = logits.log_softmax(-1)
        of_teacher = -(teacher * log_probs).sum(-1).mean()
        losses.append((1 - kappa) * F.nll_loss(log_probs, targets) + kappa * of_teacher)
    total = 0.7 * torch.stack(losses).mean()
    total.backward()
    torch.testing.assert_close(loss, expected_loss + total.detach(), rtol=1e-4, atol=1e-4)
    mixture.exits = exits
    by_hand = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() | by_hand.keys()
    reached = 0
    for name, gradient in found.items():
        of_exits = by_hand.get(name, torch.zeros_like(gradient))
        truth = expected.get(name, torch.zeros_like(gradient)) + of_exits
        scale = float(truth.abs().max()) + 0.1
        torch.testing.assert_close(gradient, truth, rtol=1e-3, atol=1e-4 * scale)
        reached += bool(of_exits.abs().max() > 1e-6)
    assert reached > len(list(exits.parameters()))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    model = tuned_model(tiny_model(), **EXITS)
    expected = gradients_of(model.train(), **BATCH)
    base = model.get_base_model()
    getattr(base, f"{CHECKPOINTING}_enable")({"use_reentrant": use_reentrant})
    base.enable_input_require_grads()
    found = gradients_of(model, **BATCH)
    torch.testing.assert_close(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_exits_in_float32(dtype):
    model = with_exits(tiny_model().to(dtype)).train()
    model.lm_head.requires_grad_(False)
    mixture = active_mixture(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**BATCH).loss
    loss.backward()
    for parameter in mixture.exits.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


def test_a_pass_that_keeps_its_loss_gets_exits_by_distillation_alone():
    model = with_exits(exit_vocabulary=None).train().requires_grad_(True)
    added = model(**BATCH, mixture_loss=False).loss
    active_mixture(model).config.exit_distillation = 1.0
    torch.testing.assert_close(added, model(**BATCH).loss, rtol=1e-4, atol=1e-4)
    active_mixture(model).config.exit_distillation = 0.0
    assert abs(added - model(**BATCH).loss) > 0.01


def test_a_pass_without_labels_says_that_exits_learn_nothing():
    model = with_exits(distillation_weight=0.0).train()
    with pytest.warns(UserWarning, match="exits' loss is left out .* or leave out `exits`"):
        model(input_ids=IDS)
    model = with_exits().train()
    with pytest.warns(UserWarning, match=r"\(and the exits'\) .*=0` and leave out `exits`"):
        model(input_ids=IDS)


# Nothing else changes.


@pytest.mark.parametrize("late_layers", [1, 3])
@pytest.mark.parametrize("way", ["peft", "attach"])
def test_the_model_answers_as_without_exits(way, late_layers):
    answers = []
    for exits in ({}, EXITS):
        model = tiny_model()
        torch.manual_seed(3)
        if way == "peft":
            options = {"r": 2, "target_modules": ["q_proj", "down_proj"], "adapt": "all"}
            options["router_init"] = "gaussian"
            model = get_peft_model(model, MoDEConfig(late_layers=late_layers, **options, **exits))
        else:
            attach(model, late_layers=late_layers, router_init="gaussian", **exits)
        state = torch.get_rng_state()  # nothing that comes later is drawn otherwise
        model.eval()
        with torch.no_grad():
            logits = model(input_ids=IDS).logits
        tokens = model.generate(input_ids=IDS, max_new_tokens=5, do_sample=False)
        weights = {n: v for n, v in model.state_dict().items() if "exits" not in n}
        answers.append((logits, tokens, state, weights))
        if exits:
            randomise(active_mixture(model).exits)
            with torch.no_grad():
                assert torch.equal(model(input_ids=IDS).logits, logits)
                assert model(input_ids=IDS, labels=IDS).loss.isfinite()
    without, found = answers
    for ours, truth in zip(found[:3], without[:3], strict=True):
        assert torch.equal(ours, truth)
    assert found[3].keys() == without[3].keys()
    assert all(torch.equal(found[3][name], value) for name, value in without[3].items())


def test_no_state_of_exits_is_kept_outside_of_training():
    model = with_exits().eval()
    norm, kept = find_mixture_norm(model), []
    model.model.norm.register_forward_pre_hook(
        lambda norm, _: kept.append(sorted(norm.capture._states.here))
    )
    model(input_ids=IDS)
    model.train()(**BATCH)
    assert kept == [[2, 3], [1, 2, 3]]
    detach(model)
    assert not any(layer._forward_pre_hooks for layer in norm.backbone.layers)


def test_without_exits_files_say_nothing_of_them(tmp_path):
    plain = MoDEConfig(target_modules=["q_proj"]).to_dict()
    assert not [name for name in plain if name.startswith(("exit", "router_learning"))]
    model = tiny_model()
    attach(model, late_layers=2)
    assert not [name for name in getattr(model.config, CONFIG_FIELD) if name.startswith("exit")]
    kept = MoDEConfig(target_modules=["q_proj"], exits=[2]).to_dict()
    assert kept["exits"] == [2]
    assert kept["exit_weight"] == MixtureConfig().exit_weight
    rate = MixtureConfig(router_learning_rate_factor=3.0).list_given()
    assert rate["router_learning_rate_factor"] == 3


# Files, copies, adapters.


def tuned_with_exits(**options):
    """Put LoRA, a mixture and exits with random weights on a tiny Llama."""
    return tuned_adapter(**{**EXITS, **options})


def exit_weights(model):
    return {name: value.clone() for name, value in find_exits(model).state_dict().items()}


def assert_same_exits(model, weights):
    found = find_exits(model).state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], value) for name, value in weights.items())


def answer(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("is_trainable", [True, False])
def test_an_adapters_file_holds_them(is_trainable, tmp_path):
    tuned = tuned_with_exits()
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=is_trainable)
    assert_same_exits(loaded, exit_weights(tuned))
    assert torch.equal(answer(loaded), answer(tuned))
    exits = find_exits(loaded)
    assert exits.layers == (1, 3)
    assert exits.rank == 3
    assert {p.requires_grad for p in exits.parameters()} == {is_trainable}
    if is_trainable:
        found, expected = (gradients_of(m.train(), **BATCH) for m in (loaded, tuned))
        torch.testing.assert_close(found, expected)


def test_an_adapters_file_without_its_exits_is_refused(tmp_path):
    tuned_with_exits().save_pretrained(tmp_path / "with")
    tuned_adapter().save_pretrained(tmp_path / "without")
    settings = (tmp_path / "with" / "adapter_config.json").read_text()
    others = (tmp_path / "without" / "adapter_config.json").read_text()
    (tmp_path / "without" / "adapter_config.json").write_text(settings)
    (tmp_path / "with" / "adapter_config.json").write_text(others)
    with pytest.raises(ValueError, match=r"lacks 6 of the adapter's tensors .*exits\.by_layer\.1"):
        PeftModel.from_pretrained(tiny_model(), tmp_path / "without")
    with pytest.raises(ValueError, match=r"holds 6 tensors .* do not use .*exits\.by_layer"):
        PeftModel.from_pretrained(tiny_model(), tmp_path / "with")
    narrow = {**json.loads(settings), "exit_rank": 2}
    (tmp_path / "with" / "adapter_config.json").write_text(json.dumps(narrow))
    with pytest.raises(ValueError, match="in the shape"):
        PeftModel.from_pretrained(tiny_model(), tmp_path / "with")


def test_merged_and_attached_models_are_saved_with_them(tmp_path):
    tuned = tuned_with_exits(adapt="all")
    weights, logits = exit_weights(tuned), answer(tuned)
    merged = tuned.merge_and_unload()
    assert_same_exits(merged, weights)
    merged.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert_same_exits(loaded, weights)
    torch.testing.assert_close(answer(loaded), logits, rtol=1e-4, atol=1e-4)
    assert find_exits(tiny_model()) is None
    mixture = detach(loaded)
    assert find_exits(loaded) is None
    assert mixture.exits.layers == (1, 3)


@pytest.mark.parametrize("merged", [False, True])
def test_copies_have_exits_of_their_own(merged):
    tuned = tuned_with_exits()
    model = tuned.merge_and_unload() if merged else tuned
    weights = exit_weights(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same_exits(twin, weights)
    loss = twin.train()(**BATCH).loss
    loss.backward()
    assert all(p.grad.any() for p in find_exits(twin).parameters())
    assert all(p.grad is None for p in find_exits(model).parameters())


def test_each_adapter_has_its_own():
    model = tuned_with_exits()
    options = {"target_modules": ["q_proj"], "r": 2, "late_layers": 2}
    model.add_adapter("other", MoDEConfig(**options, exits=[2]))
    model.add_adapter("without", MoDEConfig(**options))
    for name, layers in (("default", (1, 3)), ("other", (2,)), ("without", None)):
        model.set_adapter(name)
        exits = find_exits(model)
        assert layers == (None if exits is None else exits.layers)
        gradients_of(model.train(), **BATCH)
        got = {n.split(".lora_mode.")[1].split(".")[0] for n, p in model.named_parameters()
               if "exits" in n and p.grad is not None and p.grad.any()}  # fmt: skip
        assert got == (set() if layers is None else {name})
    model.set_adapter("default")
    with model.disable_adapter():
        assert find_exits(model) is None
        assert model(**BATCH).loss.isfinite()
    model.delete_adapter("default")
    assert find_exits(model).layers == (2,)


def test_exits_have_a_line_in_the_ledger():
    tuned = tuned_with_exits()
    ledger = parameter_ledger(tuned)
    assert ledger.exits == 2 * (16 + 2 * 3 * 16)
    assert ledger.other == 0
    assert ledger.total == sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    assert ("exits", "224") in [row[:2] for row in ledger.rows]
    assert ledger.model == parameter_ledger(tuned_adapter()).model
    assert parameter_ledger(tuned_adapter()).exits == 0
    lora = to_lora(MoDEConfig(target_modules=["q_proj"], exits=[2], late_layers=2), tiny_model())
    assert len(lora.target_modules) == 2


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exits": [2, 1]}, "`exits` must name layers below the final one, from 1 and increasing"),
        ({"exits": []}, "`exits` must name layers"),
        ({"exits": [0, 1]}, "`exits` must name layers"),
        ({"exits": [2], "exit_rank": -1}, "`exit_rank` must be at least 0"),
        ({"exits": [2], "exit_weight": 0.0}, "`exit_weight` must be above 0.*leave out `exits`"),
        ({"exits": [2], "exit_weight": float("inf")}, "`exit_weight` must be finite"),
        ({"exits": [2], "exit_distillation": 1.5}, "`exit_distillation` must be from 0 to 1"),
        ({"exits": [2], "exit_vocabulary": 0}, "`exit_vocabulary` must be at least 1"),
        ({"exits": [2], "exit_learning_rate_factor": 0.0}, "`exit_learning_rate_factor` must be"),
        ({"router_learning_rate_factor": -1.0}, "`router_learning_rate_factor` must be above 0"),
        ({"exit_weight": 1.0}, "`exit_weight` needs `exits`"),
        ({"exit_rank": 8}, "`exit_rank` needs `exits`"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    for config_cls in (MixtureConfig, MoDEConfig):
        with pytest.raises(ValueError, match=message):
            config_cls(**options)


def test_exits_above_the_model_are_refused():
    with pytest.raises(ValueError, match="from 1 to 3 and increasing, got \\[4\\]"):
        attach(tiny_model(), exits=[4])
    model = tiny_model()
    before = answer(model)
    with pytest.raises(ValueError, match="`exits` must name layers below the final one"):
        get_peft_model(model, MoDEConfig(target_modules=["q_proj"], late_layers=2, exits=[9]))
    assert torch.equal(answer(model), before)
    options = {"target_modules": ["q_proj"], "late_layers": 2, "exits": [2]}
    with pytest.raises(ValueError, match="`modules_to_save` must not name the final norm"):
        get_peft_model(model, MoDEConfig(**options, modules_to_save=["exits"]))
