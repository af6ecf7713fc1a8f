"""The fused loss against the plain one, in float64; what it costs; and which heads take it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from depthmix import MixtureConfig, attach, find_backbone
from depthmix.loss import block_gradients
from depthmix.loss.batch import mixture_loss
from depthmix.loss.block_gradients import differentiate_block
from depthmix.loss.fused import CPU_PRODUCT_ROWS, fused_sums, top_entries
from depthmix.loss.linear_head import LinearHead, is_fusable
from depthmix.loss.terms import LabelTokens, plain_sums
from depthmix.method.mixture import Routes
from models import random_ids, tiny_model

KINDS = ["reverse_kl", "forward_kl", "jsd"]


def make_backbone(*, vocab_size=61, bias=False, dtype=torch.float64, **parts):
    """Build a backbone whose frozen head is random and wide."""
    model = tiny_model("llama").requires_grad_(False)
    generator = torch.Generator().manual_seed(vocab_size)
    model.lm_head = nn.Linear(16, vocab_size, bias=bias, dtype=dtype).requires_grad_(False)
    for parameter in model.lm_head.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return replace(find_backbone(model, try_out=False), **parts)


def draw_tokens(num_tokens, *, k, vocab_size=61, num_distilled=None, seed=0, dtype=torch.float64):
    """Draw label tokens whose states and weights ask for gradients."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    states = tuple(draw(num_tokens, 16).to(dtype).requires_grad_() for _ in range(k))
    weights = draw(num_tokens, k).softmax(-1)
    wide = torch.promote_types(dtype, torch.float32)
    targets = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    num_distilled = num_tokens if num_distilled is None else num_distilled
    return LabelTokens(states, weights.to(wide).requires_grad_(), targets, num_distilled)


def through_softmax(weights, gradient):
    """Carry a gradient of routing weights on to the router's logits.

    The weights sum to one, so a constant in their gradient (the head's bias makes one) is nothing.
    """
    return weights * (gradient - (weights * gradient).sum(-1, keepdim=True))


def measure(sums_of, tokens, backbone, config, *, seed=9):
    """Give both sums, and the gradients of a weighted sum of them."""
    sums = sums_of(tokens, backbone, config)
    weigh = 0.5 + torch.rand(2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    inputs = (*tokens.states, tokens.weights)
    *gradients, of_weights = torch.autograd.grad(
        weigh[0] * sums.task + weigh[1] * sums.distillation, inputs, materialize_grads=True
    )
    of_logits = through_softmax(tokens.weights, of_weights)
    return sums.task, sums.distillation, *gradients, of_logits


OPTIONS = st.fixed_dictionaries(
    {
        "divergence": st.sampled_from(KINDS),
        "distillation_top_m": st.sampled_from([None, None, 2, 5, 60, 1000]),
    }
)


@settings(max_examples=200)
@given(
    options=OPTIONS,
    num_tokens=st.integers(0, 40),
    k=st.integers(1, 5),
    share=st.sampled_from([0.0, 0.3, 1.0, 1.0]),
    vocab_size=st.sampled_from([7, 61, 100]),
    bias=st.booleans(),
    soft_cap=st.sampled_from([None, 3.0]),
    logit_scale=st.sampled_from([1.0, 0.3]),
    seed=st.integers(0, 2**32),
)
def test_sums_and_gradients_are_the_plain_ones(
    options, num_tokens, k, share, vocab_size, bias, soft_cap, logit_scale, seed
):
    backbone = make_backbone(
        vocab_size=vocab_size, bias=bias, soft_cap=soft_cap, logit_scale=logit_scale
    )
    config = MixtureConfig(late_layers=k, **options)
    tokens = draw_tokens(
        num_tokens,
        k=k,
        vocab_size=vocab_size,
        num_distilled=round(share * num_tokens) if k > 1 else 0,
        seed=seed,
    )
    found = measure(fused_sums, tokens, backbone, config)
    expected = measure(plain_sums, tokens, backbone, config)
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("top_m", [None, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_many_chunks_are_the_plain_sums(kind, top_m):
    """More tokens than one product or one block takes, and not a whole number of either."""
    num_tokens = CPU_PRODUCT_ROWS + 77
    backbone = make_backbone()
    config = MixtureConfig(divergence=kind, distillation_top_m=top_m)
    tokens = draw_tokens(num_tokens, k=3, num_distilled=num_tokens - 100)
    found = measure(fused_sums, tokens, backbone, config)
    expected = measure(plain_sums, tokens, backbone, config)
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)
    assert expected[1] > 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_heads_err_no_more_than_the_plain_loss(dtype, kind):
    config = MixtureConfig(divergence=kind)
    exact = [
        tensor.detach()
        for tensor in measure(
            plain_sums, draw_tokens(200, k=3, dtype=torch.float64), make_backbone(), config
        )
    ]
    tokens, backbone = draw_tokens(200, k=3, dtype=dtype), make_backbone(dtype=dtype)
    found = measure(fused_sums, tokens, backbone, config)
    plain = measure(plain_sums, tokens, backbone, config)
    for ours, theirs, truth in zip(found, plain, exact, strict=True):
        error = (ours.double() - truth).norm() / truth.norm()
        plain_error = (theirs.double() - truth).norm() / truth.norm()
        assert error <= 1.5 * plain_error + 1e-6
        assert plain_error < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_certain_predictions_stay_finite(kind):
    tokens = draw_tokens(20, k=3)
    tokens = replace(
        tokens, states=tuple((1e4 * s).detach().requires_grad_() for s in tokens.states)
    )
    found = measure(fused_sums, tokens, make_backbone(), MixtureConfig(divergence=kind))
    assert all(tensor.isfinite().all() for tensor in found)


# What it costs.


class Watch(TorchDispatchMode):
    """Note every operation and the largest tensor that one made."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append(str(function))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("top_m", [None, 2])
def test_no_tensor_of_tokens_by_vocabulary_and_no_wait_for_the_device(top_m):
    vocab_size, num_tokens = 400, 6000
    tokens = draw_tokens(num_tokens, k=3, vocab_size=vocab_size)
    backbone = make_backbone(vocab_size=vocab_size)
    with Watch() as watch:
        measure(fused_sums, tokens, backbone, MixtureConfig(distillation_top_m=top_m))
    assert watch.largest <= max(CPU_PRODUCT_ROWS * vocab_size, num_tokens * 3 * 16)
    assert "aten.mm.out" in watch.calls
    waits = {"aten._local_scalar_dense.default", "aten.nonzero.default"}
    assert not waits.intersection(watch.calls)
    with Watch() as watch:
        measure(plain_sums, tokens, backbone, MixtureConfig())
    assert watch.largest >= num_tokens * vocab_size


@pytest.fixture
def products(monkeypatch):
    """Count the rows that went through the head."""
    rows = []
    project = LinearHead.project

    def count(self, states, *, out):
        rows.append(len(states))
        project(self, states, out=out)

    monkeypatch.setattr(LinearHead, "project", count)
    return rows


def make_routes(model_type="llama", *, dtype=torch.float32, batch=(3, 6), **options):
    """Draw normed states and routing weights for a tiny model; give them with its backbone."""
    model = tiny_model(model_type).requires_grad_(False)
    norm = attach(model.to(dtype), late_layers=3, **options)
    generator = torch.Generator().manual_seed(0)
    states = tuple(
        (0.3 * torch.randn(*batch, 16, generator=generator)).to(dtype).requires_grad_()
        for _ in range(3)
    )
    weights = torch.randn(*batch, 3, generator=generator).softmax(-1).requires_grad_()
    return Routes(states, weights, norm.mixture), norm.backbone


def make_labels(*shape):
    labels = random_ids(*shape, seed=4)
    labels[torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.4] = -100
    return labels


@pytest.mark.parametrize(
    ("options", "rows_per_token"),
    [
        ({}, 3),
        ({"distillation_weight": 0.0}, 1),
        ({"distillation_top_m": 5}, 1),
        ({"distillation_token_share": 0.25}, 1.5),
        ({"task_loss": 3}, 4),
        ({"task_loss": 3, "distillation_weight": 0.0}, 1),
        ({"task_loss": "layers"}, 6),
        ({"task_loss": "layers", "distillation_weight": 0.0, "log_layer_losses": True}, 3),
        ({"log_layer_losses": True}, 6),
    ],
)
def test_only_what_counts_goes_through_the_head(options, rows_per_token, products):
    routes, backbone = make_routes(batch=(8, 30), **options)
    labels = make_labels(8, 30)
    labels[0, 0] = -100
    num_tokens = int((labels[:, 1:] != -100).sum())
    mixture_loss(routes, backbone, labels).total.backward()
    assert sum(products) == pytest.approx(rows_per_token * num_tokens, abs=2)
    assert 0 < num_tokens < 200


# The batch's loss.


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        *(("llama", {"divergence": kind}) for kind in KINDS),
        *(("llama", {"reduction": reduction}) for reduction in ("mean", "batchmean", "sum")),
        ("llama", {"distillation_weight": 0.0}),
        ("llama", {"distillation_top_m": 5}),
        ("llama", {"task_loss": 3}),
        ("llama", {"train_late_norms": False, "train_final_norm": True, "top_k": 2}),
        ("gemma2", {}),
        ("gemma2", {"distillation_top_m": 5, "divergence": "jsd"}),
        ("cohere", {}),
        ("granite", {"distillation_top_m": 5}),
        ("opt", {}),
        ("phi", {"divergence": "forward_kl"}),
        ("phi", {"distillation_top_m": 5}),
        ("phi", {"task_loss": "layers"}),
    ],
)
def test_batch_loss_is_the_plain_one(model_type, options, products):
    routes, backbone = make_routes(model_type, **{"distillation_weight": 0.3, **options})
    labels = make_labels(3, 6)
    inputs = (*routes.states, routes.weights)
    found, expected = [], []
    for plain, kept in ((False, found), (True, expected)):
        loss = mixture_loss(routes, backbone, labels, num_items_in_batch=17, plain=plain)
        kept += [loss.task, loss.distillation, loss.total]
        *gradients, of_weights = torch.autograd.grad(loss.total, inputs)
        kept += [*gradients, through_softmax(routes.weights, of_weights)]
    assert products
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


def test_share_of_tokens_is_unbiased_and_drawn_anew():
    routes, backbone = make_routes(distillation_weight=0.3, distillation_token_share=0.3)
    labels = make_labels(3, 6)
    exact_routes = Routes(routes.states, routes.weights, attach_exact(routes))
    exact = mixture_loss(exact_routes, backbone, labels)
    torch.manual_seed(0)
    drawn = [mixture_loss(routes, backbone, labels) for _ in range(400)]
    values = torch.stack([loss.distillation.detach() for loss in drawn])
    assert values.std() > 0.01
    error = values.std() / len(values) ** 0.5
    assert abs(values.mean() - exact.distillation) < 4 * error
    assert error < 0.05 * exact.distillation
    for loss in drawn[:3]:
        torch.testing.assert_close(loss.task, exact.task)


def attach_exact(routes):
    """Copy the mixture's options, but distil on every token."""
    mixture = attach(tiny_model(), late_layers=3, distillation_weight=0.3).mixture
    assert mixture.config.distillation_token_share == 1
    return mixture


# Which heads take it.


def test_other_heads_take_the_plain_loss_in_chunks(products, monkeypatch):
    monkeypatch.setattr("depthmix.loss.batch.CHECKPOINTED_TOKENS", 4)
    routes, backbone = make_routes(distillation_weight=0.3)
    head, labels = backbone.head.requires_grad_(True), make_labels(3, 6)
    assert not is_fusable(head)
    inputs = (*routes.states, routes.weights, head.weight)
    found, expected = (
        torch.autograd.grad(mixture_loss(routes, backbone, labels, plain=plain).total, inputs)
        for plain in (False, True)
    )
    assert not products
    assert int((labels[:, 1:] != -100).sum()) > 4
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-6)


def test_what_is_fusable():
    linear = nn.Linear(4, 9)
    assert not is_fusable(linear)
    assert is_fusable(linear.requires_grad_(False))

    class Quantised(nn.Linear):
        def forward(self, input):
            return super().forward(input)

    assert not is_fusable(Quantised(4, 9).requires_grad_(False))
    assert not is_fusable(nn.Sequential(linear))
    for offload in (False, True):
        hooked = nn.Linear(4, 9).requires_grad_(False)
        add_hook_to_module(hooked, AlignDevicesHook(execution_device="cpu", offload=offload))
        assert is_fusable(hooked) is not offload
    linear.forward = lambda input: input
    assert not is_fusable(linear)


def test_autocast_computes_the_products_in_its_dtype(monkeypatch):
    dtypes = []
    project = LinearHead.project

    def note(self, states, *, out):
        dtypes.append((states.dtype, self.weight.dtype, out.dtype))
        project(self, states, out=out)

    monkeypatch.setattr(LinearHead, "project", note)
    routes, backbone = make_routes(distillation_weight=0.3)
    labels = make_labels(3, 6)
    expected = mixture_loss(routes, backbone, labels).total
    assert set(dtypes) == {(torch.float32,) * 3}
    dtypes.clear()
    with torch.autocast("cpu", torch.bfloat16):
        found = mixture_loss(routes, backbone, labels).total
    found.backward()
    assert set(dtypes) == {(torch.bfloat16,) * 3}
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0.0)
    assert found != expected
    assert routes.states[0].grad.abs().max() > 1e-3


# The compiled element-wise pass, and the entries that it leaves to search.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_is_the_same(dtype, monkeypatch):
    torch.compiler.reset()
    vocab_size, config = 97, MixtureConfig()
    tokens = draw_tokens(20, k=3, vocab_size=vocab_size, num_distilled=12, dtype=dtype)
    backbone = make_backbone(vocab_size=vocab_size, dtype=dtype)
    expected = measure(fused_sums, tokens, backbone, config)
    called = []
    compiler = block_gradients._compiler()
    monkeypatch.setattr(block_gradients, "COMPILED_VOCAB_SIZE", vocab_size)
    monkeypatch.setattr(block_gradients, "_compiler", lambda: called.append(1) or compiler)
    found = measure(fused_sums, tokens, backbone, config)
    assert called
    assert block_gradients._can_compile
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=tolerance, atol=1e-5)


def test_without_a_compiler_it_runs_uncompiled_and_says_so(monkeypatch):
    def fail(*_args, **_options):
        raise RuntimeError("No working C++ compiler found.\nMore of it.")

    monkeypatch.setattr(block_gradients, "COMPILED_VOCAB_SIZE", 61)
    monkeypatch.setattr(block_gradients, "_can_compile", True)
    monkeypatch.setattr(block_gradients, "_compiler", lambda: fail)
    tokens, backbone, config = draw_tokens(20, k=3), make_backbone(), MixtureConfig()
    with pytest.warns(UserWarning, match=r"install a C\+\+ compiler.*\(No working C"):
        found = measure(fused_sums, tokens, backbone, config)
    monkeypatch.setattr(block_gradients, "_compiler", None)  # not asked again
    again = measure(fused_sums, tokens, backbone, config)
    expected = measure(plain_sums, tokens, backbone, config)
    for ours, other, truth in zip(found, again, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)
        assert torch.equal(ours, other)


def test_block_is_overwritten_with_the_gradients_of_the_formulas():
    """One token by hand: section "Gradients of the loss" of the method."""
    logits = torch.tensor([[[1.0, 0.0, -1.0], [0.5, 0.2, 0.0]]], dtype=torch.float64)
    weights = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    student, teacher = logits[0, 0].log_softmax(-1), logits[0, 1].log_softmax(-1)
    kl = (student.exp() * (student - teacher)).sum()
    ensemble = (0.25 * logits[0, 0] + 0.75 * logits[0, 1]).softmax(-1)
    nll, distance = differentiate_block(
        logits, weights, torch.tensor([2]), kind="reverse_kl", scale=1.0, soft_cap=None
    )
    torch.testing.assert_close(nll[0], -ensemble[2].log())
    torch.testing.assert_close(distance[0], kl)
    torch.testing.assert_close(logits[0, 0], student.exp() * (student - teacher - kl))
    torch.testing.assert_close(logits[0, 1], ensemble - torch.tensor([0.0, 0.0, 1.0]))


@given(vocab_size=st.integers(1, 400), num_entries=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_top_entries_are_those_of_topk(vocab_size, num_entries, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, vocab_size, generator=generator, dtype=torch.float64)
    found = top_entries(logits, num_entries).sort(-1).values
    expected = logits.topk(min(num_entries, vocab_size)).indices.sort(-1).values
    assert torch.equal(found, expected)
