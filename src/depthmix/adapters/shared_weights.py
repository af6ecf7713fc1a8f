"""Weights that modules share, as tied embeddings do, before an adapter is merged into one."""

from __future__ import annotations

from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel


def part_adapted_weights(model: PreTrainedModel) -> None:
    """Give each adapted layer a weight of its own where it shares one.

    PEFT merges into the weight in place: another module that holds it would change as well, and
    where both are adapted it would be added to twice. Parted weights stay parted in the model's
    configuration, so that they are saved and loaded as two.

    Args:
        model: The model under its adapters; changed in place.
    """
    holders: dict[int, int] = {}
    for _, weight in model.named_parameters(remove_duplicate=False):
        holders[id(weight)] = holders.get(id(weight), 0) + 1
    parted = False
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or not layer.active_adapters:
            continue
        base = layer.get_base_layer()
        weight = getattr(base, "weight", None)
        if not isinstance(weight, nn.Parameter) or holders.get(id(weight), 0) < 2:
            continue
        base.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        holders[id(weight)] -= 1
        parted = True
    if parted:
        model.config.tie_word_embeddings = False
        model.config.get_text_config().tie_word_embeddings = False
