"""Exits: where they start, what they compute, and where they may be."""

from __future__ import annotations

import pytest
import torch
from tests.models import tiny_model

from depthmix.method.architecture import find_backbone
from depthmix.method.backbone import Backbone
from depthmix.method.exits import Exits


def make_exits(backbone: Backbone, layers: list[int], *, rank: int) -> Exits:
    return Exits(
        layers,
        rank=rank,
        final_norm=backbone.final_norm,
        hidden_size=backbone.hidden_size,
        num_hidden_layers=backbone.num_hidden_layers,
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("rank", [0, 4])
def test_a_new_exit_is_the_logit_lens(architecture, rank):
    backbone = find_backbone(tiny_model(architecture))
    exits = make_exits(backbone, [1, 3], rank=rank)
    hidden_states = torch.randn(2, 5, backbone.hidden_size)
    for layer in exits.layers:
        assert torch.equal(exits(layer, hidden_states), backbone.final_norm(hidden_states))


def test_the_translator_is_the_equation():
    backbone = find_backbone(tiny_model("llama"))
    exits = make_exits(backbone, [2], rank=3)
    exit_ = exits.by_layer["2"]
    torch.nn.init.normal_(exit_.up.weight)
    h = torch.randn(2, 5, backbone.hidden_size) * 7
    rms = (h * h).mean(-1, keepdim=True) ** 0.5
    inner = (h / rms) @ exit_.down.weight.T
    translated = h + rms * ((inner * inner.sigmoid()) @ exit_.up.weight.T)
    torch.testing.assert_close(exits(2, h), backbone.final_norm(translated), rtol=1e-4, atol=1e-4)


def test_exits_compute_in_float32_and_train_apart_from_the_model():
    backbone = find_backbone(tiny_model("llama").bfloat16())
    exits = make_exits(backbone, [2], rank=3)
    assert {p.dtype for p in exits.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in exits.parameters())
    assert not {id(p) for p in exits.parameters()} & {id(p) for p in backbone.model.parameters()}
    assert exits(2, torch.randn(1, 2, backbone.hidden_size).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("layers", [[], [0, 2], [2, 2], [3, 1], [4]])
def test_exits_stand_below_the_final_layer(layers):
    backbone = find_backbone(tiny_model("llama"))
    with pytest.raises(ValueError, match="`exits` must name layers below the final one"):
        make_exits(backbone, layers, rank=0)


def test_the_rank_is_not_negative():
    backbone = find_backbone(tiny_model("llama"))
    with pytest.raises(ValueError, match="`exit_rank` must be at least 0"):
        make_exits(backbone, [2], rank=-1)
