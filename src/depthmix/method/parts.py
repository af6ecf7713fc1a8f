"""A model's parts, whatever is wrapped around it: an adapter, a mixture, both or neither."""

from __future__ import annotations

from peft import PeftModel
from torch import nn

from depthmix.method.architecture import find_backbone
from depthmix.method.backbone import Backbone
from depthmix.method.exits import Exits
from depthmix.method.norm import find_mixture_norm


def find_parts(
    model: nn.Module, *, final_norm: str | None = None, decoder_layers: str | None = None
) -> tuple[Backbone, nn.Module]:
    """Find a model's parts and its pretrained final norm, under a mixture where there is one.

    Args:
        model: A decoder-only language model, with adapters and a mixture or without.
        final_norm: Full name of the final norm of a model without a mixture, where it cannot be
            found by itself.
        decoder_layers: Full name of its `ModuleList` of layers, likewise.

    Returns:
        The parts, and the norm that a new exit starts from.

    Raises:
        TypeError: If it is no decoder-only language model.
        ValueError: If a part cannot be found.
    """
    norm = find_mixture_norm(model)
    if norm is not None:
        return norm.backbone, norm.base_layer
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    backbone = find_backbone(base, final_norm=final_norm, decoder_layers=decoder_layers)
    return backbone, backbone.final_norm


def new_exits(
    backbone: Backbone, final_norm: nn.Module, layers: tuple[int, ...], *, rank: int
) -> Exits:
    """Make exits for a model, each of which starts as the pretrained norm at its layer.

    Args:
        backbone: The model's parts.
        final_norm: Its pretrained final norm.
        layers: Numbers of the layers, increasing, each below the final one.
        rank: Rank of each translator; 0 for norms alone.

    Returns:
        The exits, on the device of the norm.

    Raises:
        ValueError: As by `Exits`.
    """
    return Exits(
        layers,
        rank=rank,
        final_norm=final_norm,
        hidden_size=backbone.hidden_size,
        num_hidden_layers=backbone.num_hidden_layers,
    )
