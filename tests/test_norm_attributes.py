"""What models and tools read off a final norm is there where a mixture stands in its place."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from peft import get_peft_model
from torch import nn

from depthmix import MoDEConfig, attach, detach
from depthmix.adapters.attached import MoDENorm
from depthmix.method.norm import MixtureNorm, find_mixture_norm
from models import random_ids, tiny_model

IDS = random_ids(2, 5)


class OwnNorm(nn.LayerNorm):
    """A norm with more to it than transformers' own have."""

    kind = "own"

    def __init__(self, width):
        super().__init__(width)
        self.scale = 2.0
        self.register_buffer("steps", torch.arange(3))

    def double_eps(self):
        return 2 * self.eps

    def _hidden(self):
        return self.scale


def with_mixture(way, model):
    if way == "attach":
        attach(model, late_layers=2)
        return model
    tuned = get_peft_model(model, MoDEConfig(target_modules=["q_proj"], r=2, late_layers=2))
    return tuned.get_base_model()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("way", ["attach", "peft"])
def test_what_the_norm_has_the_mixtures_norm_has(way):
    model = tiny_model()
    model.model.norm = OwnNorm(16)
    own = model.model.norm
    norm = find_mixture_norm(with_mixture(way, model))
    assert norm.weight is own.weight
    assert norm.bias is own.bias
    assert norm.steps is own.steps
    assert (norm.eps, norm.normalized_shape, norm.scale) == (own.eps, (16,), 2.0)
    assert (norm.kind, norm.double_eps(), norm._hidden()) == ("own", 2 * own.eps, 2.0)
    assert norm.elementwise_affine is True
    for name in ("variance_epsilon", "__len__", "_nothing"):
        assert not hasattr(norm, name)
    with pytest.raises(AttributeError, match=rf"'{type(norm).__name__}' .*no attribute 'wait'"):
        norm.wait  # noqa: B018


@pytest.mark.parametrize("way", ["attach", "peft"])
def test_what_llamas_norm_lacks_is_lacking(way):
    norm = find_mixture_norm(with_mixture(way, tiny_model()))
    assert norm.variance_epsilon == norm.base_layer.variance_epsilon
    assert not hasattr(norm, "bias")
    assert not hasattr(norm, "eps")


@pytest.mark.parametrize("way", ["attach", "peft"])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_read_their_own_norm(way, clone):
    model = with_mixture(way, tiny_model())
    copied = clone(model)
    norm = find_mixture_norm(copied)
    assert norm.weight is norm.base_layer.weight
    assert norm.weight is not find_mixture_norm(model).weight
    assert torch.equal(logits(copied), logits(model))


def test_nothing_is_registered_twice():
    model = tiny_model()
    plain = set(model.state_dict())
    norm = attach(model, late_layers=2)
    assert norm.weight.shape == (16,)
    names = {name for name in model.state_dict() if ".mixture." not in name}
    assert {name.replace("norm.base_layer.", "norm.") for name in names} == plain
    assert len([p for p in model.parameters() if p is norm.weight]) == 1
    with pytest.raises(KeyError, match="already exists"):
        norm.weight = nn.Parameter(torch.ones(16))
    detach(model)


def test_the_error_of_a_property_is_its_own():
    class Broken(MoDENorm):
        @property
        def eps(self):
            return self.router_of_nobody

    model = tiny_model()
    attach(model, late_layers=2)
    norm = find_mixture_norm(model)
    norm.__class__ = Broken
    norm.base_layer.eps = 1e-3
    with pytest.raises(AttributeError, match="no attribute 'router_of_nobody'"):
        norm.eps  # noqa: B018


def test_what_a_library_hangs_onto_one_module_is_that_modules_own():
    model = tiny_model()
    norm = attach(model, late_layers=2)
    expected = logits(model)
    add_hook_to_module(norm.base_layer, AlignDevicesHook(io_same_device=True))
    norm.base_layer.pre_bwd_fn = print  # as DeepSpeed asks of each module whether it has one
    assert not hasattr(norm, "_hf_hook")
    assert not hasattr(norm, "_old_forward")
    assert not hasattr(norm, "pre_bwd_fn")
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(logits(model), expected)


def test_a_raw_copy_has_nothing_yet():
    raw = MoDENorm.__new__(MoDENorm)
    for name in ("base_layer", "weight", "_constants", "__setstate__"):
        assert hasattr(raw, name) is hasattr(MixtureNorm, name)


def test_a_model_that_reads_its_norm_goes_on():
    """Zaya casts to `norm.weight.dtype`; with one route the mixture is the base model."""
    model = tiny_model("zaya", num_key_value_heads=2)
    expected = logits(model)
    attach(model, late_layers=1)
    assert torch.equal(logits(model), expected)
