"""A finished model taken apart: a bare model, LoRA folded in, and its mixture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedModel

from depthmix.adapters.attach import detach
from depthmix.adapters.attached import MoDENorm
from depthmix.adapters.shared_weights import part_adapted_weights
from depthmix.method.architecture import find_backbone
from depthmix.method.backbone import Backbone
from depthmix.method.mixture import Mixture
from depthmix.method.norm import find_mixture_norm


@dataclass(frozen=True)
class Parts:
    """A finished model's parts, as an export is made of them."""

    backbone: Backbone
    """The bare model's parts, with its pretrained final norm."""

    mixture: Mixture | None
    """Router and norms; `None` for a model without a mixture."""

    @property
    def model(self) -> PreTrainedModel:
        """The bare model, with its adapter's weights folded into its own."""
        return self.backbone.model

    @property
    def late_layers(self) -> tuple[int, ...]:
        """Layers that can answer by themselves."""
        last = self.backbone.num_hidden_layers
        return (last,) if self.mixture is None else self.mixture.late_layers


def check_exportable(model: nn.Module) -> None:
    """Refuse a model that no ordinary folder can hold, before anything is computed.

    Args:
        model: As `load_model` gives it.

    Raises:
        ValueError: If its adapter is no change of weights, its weights are quantised, or its class
            is not one of transformers' own for text.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    kind = type(base).__name__
    if isinstance(model, PeftModel) and not isinstance(model.base_model, BaseTuner):
        method = model.peft_config[model.active_adapter].peft_type
        raise ValueError(
            f"`model` must have an adapter that can be merged into its weights, and "
            f"{getattr(method, 'value', method)} puts tokens in front of the text; export a run of "
            "another method."
        )
    assert isinstance(base, PreTrainedModel)
    if getattr(base.config, "quantization_config", None) is not None:
        raise ValueError(
            f"`model` must have weights that an adapter can be merged into, and those of {kind} "
            "are quantised; name the same base model in bfloat16 or float32."
        )
    config = type(base.config).__name__
    own = all(hasattr(transformers, name) for name in (kind, config))
    if not own or base.config.get_text_config() is not base.config:
        raise ValueError(
            f"`model` must be one of transformers' own models for text alone, and {kind} is not "
            "(it comes with code of its own, or reads more than text); share the run's adapter "
            "instead."
        )


def take_apart(model: nn.Module) -> Parts:
    """Fold a model's adapter into its weights, and take its mixture out.

    Args:
        model: As `check_exportable` lets it pass; it is changed.

    Returns:
        The parts.
    """
    bare = model
    if isinstance(model, PeftModel):
        base, tuner = model.get_base_model(), model.base_model
        assert isinstance(base, PreTrainedModel)
        assert isinstance(tuner, BaseTuner)  # or it had been refused
        part_adapted_weights(base)
        bare = tuner.merge_and_unload()
    norm = find_mixture_norm(bare)
    assert isinstance(bare, PreTrainedModel)
    mixture = detach(bare) if isinstance(norm, MoDENorm) else None
    bare.config.name_or_path = ""  # where it lay here is nobody else's business
    if mixture is None:
        return Parts(find_backbone(bare), None)
    config = mixture.config
    backbone = find_backbone(
        bare, final_norm=config.final_norm, decoder_layers=config.decoder_layers
    )
    return Parts(backbone, mixture)


def store_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Turn a model's weights into the type in which they are to be stored.

    Args:
        model: The model; changed in place.
        dtype: Type of its floating-point parameters from then on.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
