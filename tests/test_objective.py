"""Whose loss a training pass has, and whether it builds logits."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from adapters import tuned_model
from depthmix import attach
from depthmix.method.norm import find_mixture_norm
from models import ARCHITECTURES, random_ids, tiny_model

IDS = random_ids(3, 7)
LABELS = IDS.clone()
LABELS[0, :4] = -100


def train_pass(model, *args, **kwargs):
    """Run one training pass; give its output and gradients."""
    model.train().zero_grad()
    torch.manual_seed(0)  # some architectures have dropout
    output = model(*args, **{"input_ids": IDS, "labels": LABELS, **kwargs})
    (output[0] if isinstance(output, tuple) else output.loss).backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return output, gradients


def assert_same(found, expected):
    (output, gradients), (other, other_gradients) = found, expected
    torch.testing.assert_close(output.loss, other.loss)
    assert gradients.keys() == other_gradients.keys()
    assert any(value.abs().max() > 1e-3 for value in gradients.values())
    for name, value in gradients.items():
        torch.testing.assert_close(value, other_gradients[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kwargs", [{"mixture_loss": False}, {"logits_to_keep": 0}])
def test_training_pass_builds_no_logits_unless_asked(kwargs):
    model = tuned_model(distillation_weight=0.3)
    widths = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _module, args, _output: widths.append(args[0].shape[1]))
    replaced, asked = train_pass(model), train_pass(model, **kwargs)
    assert (widths[0], max(widths)) == (0, 7)
    assert replaced[0].logits is None
    assert asked[0].logits.shape == (3, 7, 61)
    assert_same(replaced, asked)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture_has_the_same_loss_either_way(model_type):
    model = tiny_model(model_type).requires_grad_(False)
    attach(model, late_layers=3, distillation_weight=0.3)
    assert_same(train_pass(model), train_pass(model, mixture_loss=False))


def test_other_passes_keep_their_logits():
    model = tuned_model(distillation_weight=0.3)
    assert model.eval()(input_ids=IDS, labels=LABELS).logits.shape == (3, 7, 61)
    assert model.train()(input_ids=IDS).logits.shape == (3, 7, 61)
    with torch.no_grad():
        output = model(input_ids=IDS, labels=LABELS)
    assert output.logits.shape == (3, 7, 61)
    with model.disable_adapter():
        assert model(input_ids=IDS, labels=LABELS).logits.shape == (3, 7, 61)


def test_tuple_and_shifted_labels():
    model = tuned_model(distillation_weight=0.3)
    output, _ = train_pass(model)
    as_tuple, _ = train_pass(model, return_dict=False)
    assert isinstance(as_tuple, tuple)
    torch.testing.assert_close(as_tuple[0], output.loss)
    shifted = torch.cat([LABELS[:, 1:], torch.full((3, 1), -100)], dim=1)
    again, _ = train_pass(model, labels=None, shift_labels=shifted)
    torch.testing.assert_close(again.loss, output.loss)


def test_positional_arguments_are_understood():
    model = tiny_model().requires_grad_(False)
    attach(model, late_layers=3, distillation_weight=0.3)
    expected, _ = train_pass(model)
    loss = model.train()(IDS, None, None, None, None, LABELS).loss
    torch.testing.assert_close(loss, expected.loss)


def test_models_with_a_loss_of_their_own_keep_it():
    model = tiny_model().requires_grad_(False)
    attach(model, late_layers=3, distillation_weight=0.3)
    plain, _ = train_pass(model)
    model.loss_function = lambda *args, **kwargs: 2 * ForCausalLMLoss(*args, **kwargs)
    own, _ = train_pass(model)
    assert own.logits.shape == (3, 7, 61)
    task = model.eval()(input_ids=IDS, labels=LABELS).loss / 2
    torch.testing.assert_close(own.loss - plain.loss, task)


@pytest.mark.parametrize("way", ["config", "argument"])
def test_expert_routers_keep_their_loss(way):
    model = tiny_model("mixtral", router_aux_loss_coef=0.5).requires_grad_(False)
    attach(model, late_layers=3, distillation_weight=0.3)
    plain, _ = train_pass(model)
    if way == "config":
        model.config.output_router_logits = True
    kwargs = {"output_router_logits": True} if way == "argument" else {}
    output, _ = train_pass(model, **kwargs)
    assert plain.logits is None
    assert output.aux_loss > 0
    torch.testing.assert_close(output.loss - plain.loss, 0.5 * output.aux_loss)


def test_asking_for_the_loss_without_labels_is_an_error():
    model = tuned_model().train()
    with pytest.raises(RuntimeError, match="`mixture_loss=True` needs `labels`"):
        model(input_ids=IDS, mixture_loss=True)


@pytest.mark.parametrize("way", ["replaced", "added"])
@pytest.mark.parametrize("inner", ["trained", "evaluated", "interrupted"])
def test_a_pass_within_a_pass_leaves_the_outer_its_loss(way, inner):
    model = tuned_model(distillation_weight=0.3)
    kwargs = {} if way == "replaced" else {"mixture_loss": False}
    expected, found = train_pass(model, **kwargs), []
    others = random_ids(2, 5, seed=1)
    alone = model(input_ids=others, labels=others).loss

    def run_another(*_):
        if found:
            return
        found.append(None)
        if inner == "interrupted":
            with pytest.raises(IndexError):
                model(input_ids=others + 61, labels=others)
            model(input_ids=others, labels=others)
        with torch.set_grad_enabled(inner != "evaluated"):
            found[:] = [model(input_ids=others, labels=others).loss]

    head = model.get_output_embeddings()
    handle = head.register_forward_hook(run_another)
    assert_same(train_pass(model, **kwargs), expected)
    handle.remove()
    if inner != "evaluated":
        torch.testing.assert_close(found[0], alone)
    assert_same(train_pass(model, **kwargs), expected)
    norm = find_mixture_norm(model)
    assert not norm.objective._passes.here


def test_a_thread_collects_its_own_passes():
    model = tuned_model(distillation_weight=0.3).train()
    objective = find_mixture_norm(model).objective

    def add_term():
        return model(input_ids=IDS, labels=LABELS, mixture_loss=False).loss.detach()

    expected = add_term()
    with objective.collecting() as steps, ThreadPoolExecutor(1) as pool:
        elsewhere = pool.submit(add_term).result()
        assert not steps
        here = add_term()
    assert torch.equal(elsewhere, expected)
    assert [step.num_tokens for step in steps] == [int((LABELS[:, 1:] != -100).sum())]
    torch.testing.assert_close(here + steps[0].missing, expected)
    assert torch.equal(add_term(), expected)
