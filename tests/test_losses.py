"""The objective as a function: against naive references in float64, and its properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from depthmix import attach
from depthmix.loss.batch import mixture_loss
from depthmix.loss.terms import divergence, label_positions
from depthmix.method.mixture import Routes
from models import random_ids, tiny_model
from references import divergence as naive_divergence
from references import reduce_divergence

KINDS = ["reverse_kl", "forward_kl", "jsd"]
REDUCTIONS = ["mean", "batchmean", "sum"]
LABELS = random_ids(3, 6, seed=4)
LABELS[0, :3] = -100
LABELS[1, 4:] = -100
LABELS[2, 2] = -100

LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=5, max_size=5).map(torch.tensor)


# Divergences.


@pytest.mark.parametrize("kind", KINDS)
@given(logits=LOGITS, teacher=LOGITS)
def test_divergence_is_the_naive_one(kind, logits, teacher):
    found = divergence(logits.log_softmax(-1), teacher.log_softmax(-1), kind)
    truth = naive_divergence(logits.double().softmax(-1), teacher.double().softmax(-1), kind)
    assert float(found) == pytest.approx(truth, rel=1e-4, abs=1e-5)
    assert found >= -1e-6
    if kind == "jsd":
        assert found <= math.log(2) + 1e-6
        swapped = divergence(teacher.log_softmax(-1), logits.log_softmax(-1), kind)
        assert float(swapped) == pytest.approx(float(found), abs=1e-6)
    if (logits.softmax(-1) - teacher.softmax(-1)).abs().max() > 0.05:
        assert found > 1e-4
    assert divergence(logits.log_softmax(-1), logits.log_softmax(-1), kind).abs() < 1e-6


def test_reverse_kl_has_the_student_first():
    student, teacher = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log()
    reverse = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    forward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert float(divergence(student, teacher, "reverse_kl")) == pytest.approx(reverse, rel=1e-5)
    assert float(divergence(student, teacher, "forward_kl")) == pytest.approx(forward, rel=1e-5)
    assert reverse != pytest.approx(forward, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_divergence_of_certain_predictions_is_finite(kind):
    logits = torch.tensor([1e4, 0.0, -1e4], requires_grad=True)
    value = divergence(logits.log_softmax(-1), torch.tensor([-1e4, 0.0, 1e4]).log_softmax(-1), kind)
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()


# Label positions.


@given(st.integers(0, 2**32))
def test_label_positions_predict_the_following_label(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 9, (3, 5), generator=generator)
    labels[torch.rand(3, 5, generator=generator) < 0.5] = -100
    places, targets = label_positions(labels)
    expected = [
        (row, t, int(labels[row, t + 1]))
        for row in range(3)
        for t in range(4)
        if labels[row, t + 1] != -100
    ]
    assert [
        (place // 5, place % 5, token)
        for place, token in zip(places.tolist(), targets.tolist(), strict=True)
    ] == expected
    shifted = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], dim=1)
    again = label_positions(shifted, shifted=True)
    assert torch.equal(again[0], places)
    assert torch.equal(again[1], targets)


# The whole objective.


def label_mask(labels):
    """Mark the positions that predict a label."""
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask.view(-1)[label_positions(labels)[0]] = True
    return mask


def make_routes(model_type="llama", *, seed=0, **options):
    """Draw normed states and routing weights for a tiny model; give them with its backbone."""
    norm = attach(tiny_model(model_type), late_layers=3, **options)
    generator = torch.Generator().manual_seed(seed)
    states = tuple(
        (0.3 * torch.randn(3, 6, 16, generator=generator)).requires_grad_() for _ in range(3)
    )
    weights = torch.randn(3, 6, 3, generator=generator).softmax(-1).requires_grad_()
    return Routes(states, weights, norm.mixture), norm.backbone


def naive_logits(routes, backbone):
    """Compute each route's own logits and their mixture, in float64 and in full."""
    head = backbone.model.lm_head.weight.double()
    raw = [state.double() @ head.T * backbone.logit_scale for state in routes.states]
    cap = backbone.soft_cap
    capped = (lambda x: x) if cap is None else (lambda x: cap * torch.tanh(x / cap))
    mixed = sum(routes.weights[..., i, None].double() * part for i, part in enumerate(raw))
    return [capped(part) for part in raw], capped(mixed)


def naive_cross_entropy(logits, labels):
    nll = [
        -logits[row, t].log_softmax(-1)[labels[row, t + 1]]
        for row in range(labels.shape[0])
        for t in range(labels.shape[1] - 1)
        if labels[row, t + 1] != -100
    ]
    return torch.stack(nll).mean()


@pytest.mark.parametrize(
    ("model_type", "kind", "reduction"),
    [
        *(("llama", kind, reduction) for kind in KINDS for reduction in REDUCTIONS),
        *((model_type, kind, "mean") for model_type in ("gemma2", "cohere") for kind in KINDS),
    ],
)
def test_objective_is_the_naive_one(model_type, kind, reduction):
    routes, backbone = make_routes(
        model_type, divergence=kind, reduction=reduction, distillation_weight=0.3
    )
    loss = mixture_loss(routes, backbone, LABELS)
    with torch.no_grad():
        parts, mixed = naive_logits(routes, backbone)
        task = float(naive_cross_entropy(mixed, LABELS))
    distillation = reduce_divergence(parts[:-1], parts[-1], LABELS, kind=kind, reduction=reduction)
    assert float(loss.task) == pytest.approx(task, rel=1e-5)
    assert float(loss.distillation) == pytest.approx(distillation, rel=1e-4)
    assert float(loss.total) == pytest.approx(task + 0.3 * distillation, rel=1e-4)
    assert distillation > 0.01


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_gradients_follow_the_formulas(model_type):
    """Section "Gradients of the loss" of the method, for `reverse_kl` with the teacher detached."""
    routes, backbone = make_routes(model_type, distillation_weight=0.3)
    mixture_loss(routes, backbone, LABELS).total.backward()
    found = [tensor.grad for tensor in (*routes.states, routes.weights)]
    for tensor in (*routes.states, routes.weights):
        tensor.grad = None
    (*late, final), mixed = naive_logits(routes, backbone)
    mask = label_mask(LABELS)
    teacher = final.detach().log_softmax(-1)
    student = [part.log_softmax(-1) for part in late]
    kl = sum((p.exp() * (p - teacher)).sum(-1)[mask].mean() for p in student)
    (naive_cross_entropy(mixed, LABELS) + 0.3 * kl).backward()
    for ours, tensor in zip(found, (*routes.states, routes.weights), strict=True):
        torch.testing.assert_close(ours, tensor.grad, rtol=1e-3, atol=1e-5)
        assert (ours[~mask] == 0).all()
        assert ours[mask].abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_kept", [2, 9, 61, 1000])
def test_top_m_renormalises_on_the_ensembles_likeliest_entries(num_kept, kind):
    routes, backbone = make_routes(
        divergence=kind, distillation_weight=0.3, distillation_top_m=num_kept
    )
    (*late, final), mixed = naive_logits(routes, backbone)
    total, tokens = 0.0, 0
    for row, t in label_mask(LABELS).nonzero().tolist():
        kept = mixed[row, t].argsort(descending=True)[:num_kept]
        teacher = final[row, t, kept].softmax(-1)
        total += sum(
            naive_divergence(part[row, t, kept].softmax(-1), teacher, kind) for part in late
        )
        tokens += 1
    for plain in (True, False):
        loss = mixture_loss(routes, backbone, LABELS, plain=plain)
        assert float(loss.distillation) == pytest.approx(total / tokens, rel=1e-4)
        assert float(loss.task) == pytest.approx(
            float(naive_cross_entropy(mixed, LABELS)), rel=1e-5
        )


def test_distillation_alone_moves_no_teacher_and_no_router():
    routes, backbone = make_routes(distillation_weight=0.3)
    mixture_loss(routes, backbone, LABELS).distillation.backward()
    *late, final = routes.states
    assert all(state.grad.abs().max() > 1e-3 for state in late)
    assert final.grad is None or not final.grad.any()
    assert routes.weights.grad is None or not routes.weights.grad.any()


@given(st.integers(0, 2**32))
def test_positions_without_a_label_change_nothing(seed):
    routes, backbone = make_routes(distillation_weight=0.3)
    expected = mixture_loss(routes, backbone, LABELS)
    mask = label_mask(LABELS)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.where(mask[..., None], 0.0, 100 * torch.randn(3, 6, 16, generator=generator))
    moved = Routes(tuple(s + noise for s in routes.states), routes.weights, routes.mixture)
    found = mixture_loss(moved, backbone, LABELS)
    assert torch.equal(found.total, expected.total)


@pytest.mark.parametrize("num_items_in_batch", [None, 0, 7, torch.tensor(0), torch.tensor(7)])
@pytest.mark.parametrize("distillation_weight", [0.0, 0.3])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_label_token_gives_zero_and_zero_gradients(
    num_items_in_batch, distillation_weight, reduction
):
    routes, backbone = make_routes(distillation_weight=distillation_weight, reduction=reduction)
    labels = torch.full_like(LABELS, -100)
    loss = mixture_loss(routes, backbone, labels, num_items_in_batch=num_items_in_batch)
    assert (float(loss.task), float(loss.distillation), float(loss.total)) == (0, 0, 0)
    loss.total.backward()
    assert all(not state.grad.any() for state in routes.states)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_micro_batches_add_up_to_the_batch(reduction):
    routes, backbone = make_routes(distillation_weight=0.3, reduction=reduction)
    whole = mixture_loss(routes, backbone, LABELS)
    num_tokens = int((LABELS[:, 1:] != -100).sum())
    parts = [
        mixture_loss(
            Routes(tuple(s[rows] for s in routes.states), routes.weights[rows], routes.mixture),
            backbone,
            LABELS[rows],
            num_items_in_batch=num_tokens,
            num_sequences_in_batch=3,
        )
        for rows in (slice(0, 1), slice(1, 3))
    ]
    for name in ("task", "distillation", "total"):
        summed = sum(getattr(part, name) for part in parts)
        torch.testing.assert_close(summed, getattr(whole, name))
    assert all(part.weight_per_token == pytest.approx(whole.weight_per_token) for part in parts)
    assert sum(part.num_tokens for part in parts) == num_tokens == parts[0].num_items


def test_shifted_labels_are_the_same_labels():
    routes, backbone = make_routes(distillation_weight=0.3)
    shifted = torch.cat([LABELS[:, 1:], torch.full((3, 1), -100)], dim=1)
    expected = mixture_loss(routes, backbone, LABELS).total
    assert torch.equal(mixture_loss(routes, backbone, shifted, shifted=True).total, expected)
    assert mixture_loss(routes, backbone, shifted).total != expected


@pytest.mark.parametrize(("reduction", "tokens"), [("mean", 1), ("batchmean", 3), ("sum", 9)])
def test_weight_per_token_says_what_a_nat_of_divergence_costs(reduction, tokens):
    routes, backbone = make_routes(distillation_weight=0.3, reduction=reduction)
    labels = LABELS.clone()
    labels[:, :3], labels[:, 3:] = -100, 5
    loss = mixture_loss(routes, backbone, labels)
    assert loss.weight_per_token == pytest.approx(0.3 * tokens)


def test_no_distillation_costs_one_term():
    routes, backbone = make_routes(distillation_weight=0.0)
    loss = mixture_loss(routes, backbone, LABELS)
    assert torch.equal(loss.total, loss.task)
    assert not loss.distillation.any()
