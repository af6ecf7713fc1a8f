"""The loss of exits: the fused one against the plain one, and what it is on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from depthmix import MixtureConfig, attach
from depthmix.loss.batch import mixture_loss
from depthmix.loss.exit_terms import ExitTokens, draw_entries
from depthmix.loss.fused import fused_sums
from depthmix.loss.terms import plain_sums
from depthmix.method.mixture import Routes
from models import randomise, tiny_model
from test_fused_loss import Watch, draw_tokens, make_backbone, make_labels

EXITS = {"exits": [1, 3], "exit_rank": 3, "exit_weight": 0.7}
EXITS |= {"exit_distillation": 0.3, "exit_vocabulary": 20}


# The loss of exits as a function.


def draw_exit_tokens(num_tokens, *, num_exits, vocab_size, num_entries, kappa, seed):
    """Draw what exits make of label tokens, with a part of the vocabulary or all of it."""
    generator = torch.Generator().manual_seed(seed)
    states = tuple(
        torch.randn(num_tokens, 16, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(num_exits)
    )
    if num_entries is None:
        places = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
        return ExitTokens(states, places, None, kappa)
    entries = torch.randperm(vocab_size, generator=generator)[:num_entries].sort().values
    places = torch.randint(0, len(entries), (num_tokens,), generator=generator)
    return ExitTokens(states, places, entries, kappa)


@settings(max_examples=60)
@given(
    num_tokens=st.sampled_from([0, 1, 5, 40, 150]),
    k=st.integers(1, 3),
    share=st.sampled_from([0.0, 0.4, 1.0]),
    num_exits=st.integers(1, 4),
    num_entries=st.sampled_from([None, 1, 7, 30]),
    kappa=st.sampled_from([0.0, 0.3, 1.0]),
    bias=st.booleans(),
    soft_cap=st.sampled_from([None, 3.0]),
    logit_scale=st.sampled_from([1.0, 0.3]),
    seed=st.integers(0, 2**32),
)
def test_sums_and_gradients_are_the_plain_ones(
    num_tokens, k, share, num_exits, num_entries, kappa, bias, soft_cap, logit_scale, seed
):
    backbone = make_backbone(bias=bias, soft_cap=soft_cap, logit_scale=logit_scale)
    distilled = round(share * num_tokens) if k > 1 else 0
    tokens = draw_tokens(num_tokens, k=k, num_distilled=distilled, seed=seed)
    exits = draw_exit_tokens(
        num_tokens,
        num_exits=num_exits,
        vocab_size=61,
        num_entries=num_entries,
        kappa=kappa,
        seed=seed,
    )
    tokens = replace(tokens, exits=exits)
    inputs = (*exits.states, *tokens.states)
    found, expected = [], []
    for sums_of, kept in ((fused_sums, found), (plain_sums, expected)):
        sums = sums_of(tokens, backbone, MixtureConfig(late_layers=k))
        kept += [sums.exits.loss, sums.exits.nll, sums.exits.agreed, sums.task]
        total = 0.6 * sums.exits.loss + sums.task
        kept += torch.autograd.grad(total, inputs, materialize_grads=True)
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)
        assert ours.dtype == torch.float64


def test_one_token_by_hand():
    """The formula, entry by entry: two exits, three entries of four, the teacher's own weights."""
    backbone = make_backbone(vocab_size=4)
    tokens = draw_tokens(1, k=2, vocab_size=4, seed=3)
    exits = draw_exit_tokens(1, num_exits=2, vocab_size=4, num_entries=3, kappa=0.25, seed=3)
    sums = plain_sums(replace(tokens, exits=exits), backbone, MixtureConfig(late_layers=2)).exits
    head = backbone.head.weight[exits.vocabulary]
    mixed = sum(tokens.weights[0, i] * tokens.states[i][0] for i in range(2))
    teacher = (head @ mixed).softmax(0)
    losses, nll, agreed = [], [], []
    for state in exits.states:
        log_probs = (head @ state[0]).softmax(0).log()
        nll.append(-log_probs[exits.targets[0]])
        losses.append(0.75 * nll[-1] - 0.25 * (teacher * log_probs).sum())
        agreed.append(float(log_probs.argmax() == teacher.argmax()))
    torch.testing.assert_close(sums.loss, sum(losses) / 2)
    torch.testing.assert_close(sums.nll, torch.stack(nll).detach())
    assert sums.agreed.tolist() == agreed
    assert not sums.nll.requires_grad
    assert not any(
        state is not None and state.any()  # the teacher is detached
        for state in torch.autograd.grad(sums.loss, tokens.states, allow_unused=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_heads_err_little(dtype):
    exact = draw_exit_tokens(200, num_exits=3, vocab_size=61, num_entries=30, kappa=0.5, seed=0)
    found = []
    for kind in (torch.float64, dtype):
        tokens = draw_tokens(200, k=3, dtype=kind)
        exits = replace(exact, states=tuple(s.detach().requires_grad_() for s in exact.states))
        backbone = make_backbone(dtype=kind)
        sums = fused_sums(replace(tokens, exits=exits), backbone, MixtureConfig())
        found.append([sums.exits.loss, *torch.autograd.grad(sums.exits.loss, exits.states)])
        assert found[-1][0].dtype == torch.promote_types(kind, torch.float32)
    for ours, truth in zip(found[1], found[0], strict=True):
        error = (ours.double() - truth).norm() / truth.norm()
        assert error < (0.02 if dtype == torch.bfloat16 else 1e-5)


def test_no_product_with_the_whole_head_for_exits():
    vocab_size, num_tokens = 4000, 700
    tokens = draw_tokens(num_tokens, k=1, vocab_size=vocab_size, num_distilled=0)
    exits = draw_exit_tokens(
        num_tokens, num_exits=3, vocab_size=vocab_size, num_entries=50, kappa=0.5, seed=0
    )
    backbone, calls = make_backbone(vocab_size=vocab_size), []
    for one in (None, exits):
        with Watch() as watch:
            fused_sums(replace(tokens, exits=one), backbone, MixtureConfig(late_layers=1))
        calls.append(watch.calls.count("aten.index.Tensor"))
        assert watch.largest <= 512 * vocab_size
        assert not {"aten._local_scalar_dense.default", "aten.nonzero.default"} & set(watch.calls)
    assert calls[1] - calls[0] == 1  # the head's rows are taken once


# What the loss is on.


def test_entries_are_labels_and_others_drawn_anew():
    targets = torch.tensor([5, 90_000, 5, 17])
    weights = torch.randn(3, 8)
    draw = lambda targets, salt: draw_entries(  # noqa: E731
        targets, num_drawn=50, vocab_size=100_000, salt=salt
    )
    state = torch.get_rng_state()
    first = draw(targets, weights)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, draw(targets, weights))
    assert torch.equal(first, first.unique())
    assert set(targets.tolist()) <= set(first.tolist())
    assert 45 <= len(first) <= 53
    moved = draw(targets, weights + 1e-6)
    others = draw(targets + 1, weights)
    for another in (moved, others):
        assert len(set(first.tolist()) & set(another.tolist())) < 10
    everything = torch.cat([draw(targets, weights + i) for i in range(60)]).double()
    assert 45_000 < everything.mean() < 55_000


# The loss of a batch.

MODELS = [
    ("llama", {}),
    ("llama", {"late_layers": 1}),
    ("llama", {"exit_vocabulary": None, "exit_distillation": 0.0}),
    ("llama", {"exit_rank": 0, "top_k": 2}),
    ("llama", {"task_loss": 3}),
    ("llama", {"task_loss": "layers", "distillation_weight": 0.0, "log_layer_losses": True}),
    ("llama", {"distillation_top_m": 5, "distillation_token_share": 0.4}),
    ("gemma2", {}),
    ("cohere", {"exit_distillation": 1.0}),
    ("granite", {}),
    ("opt", {}),
    ("phi", {}),
    ("gpt2", {}),
    ("deepseek_v3", {"exits": [2]}),
]


def make_routes(model_type, **options):
    """Draw normed states, weights and residual streams for a tiny model whose exits are random."""
    options = {**EXITS, "late_layers": 3, "distillation_weight": 0.3, **options}
    model = tiny_model(model_type).requires_grad_(False)
    norm = attach(model, **options)
    randomise(norm.mixture.exits, seed=2, only_trainable=True)
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(3, 6, 16, generator=generator).requires_grad_()  # noqa: E731
    k = options["late_layers"]
    states = tuple(draw() for _ in range(k))
    weights = torch.randn(3, 6, k, generator=generator).softmax(-1).requires_grad_()
    streams = {layer: draw() for layer in options["exits"]}
    return Routes(states, weights, norm.mixture, streams), norm.backbone


def weigh(routes):
    return [*routes.states, *routes.exit_states.values(), *routes.mixture.exits.parameters()]


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize(("model_type", "options"), MODELS)
def test_batch_loss_is_the_plain_one(model_type, options, trained_head, monkeypatch):
    monkeypatch.setattr("depthmix.loss.batch.CHECKPOINTED_TOKENS", 4)
    routes, backbone = make_routes(model_type, **options)
    backbone.head.requires_grad_(trained_head)
    labels = make_labels(3, 6)
    found, expected = [], []
    for plain, kept in ((False, found), (True, expected)):
        torch.manual_seed(0)  # of the tokens that are distilled
        loss = mixture_loss(routes, backbone, labels, num_items_in_batch=17, plain=plain)
        kept += [loss.total, loss.task, loss.distillation, loss.exit_losses, loss.exit_agreements]
        kept += torch.autograd.grad(loss.total, weigh(routes), materialize_grads=True)
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)
    # Streams below the exits and every part of these get a gradient.
    assert all(gradient.abs().max() > 1e-6 for gradient in found[5 + len(routes.states) :])


def test_total_is_the_sum_of_its_terms_and_a_share_of_the_batch():
    routes, backbone = make_routes("llama")
    labels = make_labels(3, 6)
    num_tokens = int((labels[:, 1:] != -100).sum())
    whole = mixture_loss(routes, backbone, labels)
    share = mixture_loss(routes, backbone, labels, num_items_in_batch=4 * num_tokens)
    torch.testing.assert_close(4 * share.total, whole.total)
    without = mixture_loss(replace(routes, exit_states={}), backbone, labels)
    assert len(without.exit_losses) == 0
    ours = (whole.total - without.total) / 0.7
    distilled = mixture_loss(routes, backbone, labels, exit_distillation=1.0)
    of_teacher = (distilled.total - without.total) / 0.7
    expected = 0.7 * whole.exit_losses.mean() + 0.3 * of_teacher
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(whole.exit_losses, share.exit_losses)


def test_no_label_token_gives_zero_and_zero_gradients():
    routes, backbone = make_routes("llama")
    loss = mixture_loss(routes, backbone, torch.full((3, 6), -100))
    assert not loss.total.detach()
    assert loss.exit_losses.tolist() == loss.exit_agreements.tolist() == [0, 0]
    loss.total.backward()
    for parameter in routes.mixture.exits.parameters():  # none is unused
        assert parameter.grad is not None
        assert not parameter.grad.any()
