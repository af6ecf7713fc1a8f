"""MoDE on a bare model: put the mixture in the final norm's place, and take it away again."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming, WeightTransform

from depthmix.adapters.attached import MoDENorm
from depthmix.adapters.witness import PeftWitness
from depthmix.loss.objective import Objective
from depthmix.method.architecture import find_backbone
from depthmix.method.backbone import Backbone
from depthmix.method.capture import undoing_hooks
from depthmix.method.config import MixtureConfig
from depthmix.method.mixture import Mixture
from depthmix.method.norm import find_mixture_norm
from depthmix.method.placement import find_device

CONFIG_FIELD = "mixture_of_depths"
"""Field of a model's configuration that holds the options of an attached mixture."""

HIDDEN = "::"
"""What stands before a name that is written as digits; no name of a weight has it."""


def attach(model: PreTrainedModel, config: MixtureConfig | None = None, **options: Any) -> MoDENorm:
    """Put a new mixture in the place of the model's final norm, for example to tune all weights.

    The model is changed in place and goes on working as before, with the ensemble's predictions;
    its other parameters stay trainable or frozen as they were. `save_pretrained` saves it, a
    trainer's checkpoints hold it, and `depthmix.load` brings it back. For LoRA under the mixture
    use `MoDEConfig` instead: any other PEFT method freezes an attached mixture, and its file does
    not hold it. That is refused, unless the mixture has been trained or loaded (docs/api.md).

    Args:
        model: A decoder-only language model.
        config: The mixture's options.
        options: Fields of `MixtureConfig`, instead of `config`.

    Returns:
        The module that now stands for the final norm.

    Raises:
        RuntimeError: If the model has a mixture already.
        TypeError: If both `config` and options are given, or the model is no decoder.
        ValueError: If a part of the model cannot be found or an option does not fit it.
    """
    if config is not None and options:
        raise TypeError(
            f"`config` and the options {', '.join(options)} cannot both be given; "
            "put the options into `MixtureConfig`."
        )
    if isinstance(model, PeftModel):
        raise TypeError(
            "`model` must be a bare model, and it has PEFT adapters; give them a mixture by "
            "`MoDEConfig.from_lora`, or fold them in by `merge_and_unload()` before."
        )
    if find_mixture_norm(model) is not None:
        raise RuntimeError(
            "`model` has a mixture already; call `detach(model)` first, or use PEFT's "
            "`add_adapter` for a second one."
        )
    config = MixtureConfig(**options) if config is None else copy.deepcopy(config)
    backbone = find_backbone(
        model, final_norm=config.final_norm, decoder_layers=config.decoder_layers
    )
    late_layers = config.resolve_late_layers(backbone.num_hidden_layers)
    mixture = Mixture(
        config,
        final_norm=backbone.final_norm,
        late_layers=late_layers,
        hidden_size=backbone.hidden_size,
    )
    mixture.to(find_device(backbone.final_norm) or find_device(backbone.head), torch.float32)
    return install(backbone, mixture, is_new=True)


def install(backbone: Backbone, mixture: Mixture, *, is_new: bool = False) -> MoDENorm:
    """Put an existing mixture in the place of the final norm, with its training objective.

    The model's configuration says so from then on, and is saved with it. The pretrained norm is
    saved under its ordinary names, by transformers' renaming of weights, which also holds for the
    state dicts that FSDP and DeepSpeed gather. Where it is interrupted, the model stays as it was.

    Args:
        backbone: The model's parts.
        mixture: The mixture that predicts from now on.
        is_new: Whether it has learnt nothing yet.

    Returns:
        The module that now stands for the final norm.
    """
    model: Any = backbone.model
    final_norm = backbone.final_norm
    before = [(owner, dict(owner)) for owner in (vars(model), vars(model.config))]
    with undoing_hooks([model, backbone.trunk, *backbone.layers]):
        try:
            norm = _install(backbone, mixture)
            if is_new:
                norm.witness.is_new()
            return norm
        except BaseException:
            model.set_submodule(backbone.final_norm_name, final_norm)
            for owner, entries in before:
                owner.clear()
                owner.update(entries)
            raise


def _install(backbone: Backbone, mixture: Mixture) -> MoDENorm:
    """Do so, step by step."""
    norm = MoDENorm(backbone, mixture)
    norm.train(backbone.model.training)
    model: Any = backbone.model
    name = backbone.final_norm_name
    options = mixture.config.list_given()
    options["late_layers"] = list(mixture.late_layers)
    setattr(model.config, CONFIG_FIELD, options)
    model._weight_conversions = [
        MixtureName(f"{name}.mixture.", last=True),
        *_list_conversions(model),
        *(
            BaseLayerName(f"{name}.{key}", f"{name}.base_layer.{key}")
            for key in norm.base_layer.state_dict()
        ),
        MixtureName(f"{name}.mixture."),
    ]
    backbone.model.set_submodule(backbone.final_norm_name, norm)
    norm.objective = Objective(norm)
    norm.witness = PeftWitness(norm)
    return norm


def detach(model: PreTrainedModel) -> Mixture:
    """Give the model its own final norm back, and take the mixture out.

    Args:
        model: A model that `attach` has changed.

    Returns:
        The mixture, with its weights.

    Raises:
        RuntimeError: If there is no attached mixture.
    """
    norm = find_mixture_norm(model)
    if not isinstance(norm, MoDENorm):
        raise RuntimeError(
            "`model` has no attached mixture to take away; a PEFT adapter is removed by `unload()`."
        )
    norm.unwatch()
    norm.objective.remove()
    bare: Any = norm.backbone.model
    bare.set_submodule(norm.backbone.final_norm_name, norm.base_layer)
    bare.config.__dict__.pop(CONFIG_FIELD, None)
    bare._weight_conversions = [
        one for one in _list_conversions(bare) if not isinstance(one, (BaseLayerName, MixtureName))
    ]
    return norm.mixture


class BaseLayerName(WeightRenaming):
    """The name of a pretrained norm's weight: in files, and behind a mixture."""

    __slots__ = ()


class MixtureName(WeightRenaming):
    """Keeps a mixture's names from what else is renamed: a model's `router` may be a `gate` there.

    transformers applies its conversions one after the other, in the reverse order to save. The last
    of the list writes a mixture's name as digits, in which no other finds its own, and the first
    reads it from them.

    Args:
        prefix: What the names of the mixture's weights begin with in the model.
        last: Whether the names are read again, as is done last in saving.
    """

    __slots__ = ("last", "prefix")

    def __init__(self, prefix: str, *, last: bool = False) -> None:
        super().__init__(re.escape(prefix), prefix)
        self.prefix, self.last = prefix, last

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Hide a name of the mixture's, or show it again; leave any other."""
        if self.last and HIDDEN in source_key:  # other parts may have been put in front of it
            return bytes.fromhex(source_key.partition(HIDDEN)[2]).decode(), self.prefix
        if not self.last and source_key.startswith(self.prefix):
            return HIDDEN + source_key.encode().hex(), self.prefix
        return source_key, None

    def reverse_transform(self) -> MixtureName:
        """Give what is used to save: the same, since names are only kept."""
        return MixtureName(self.prefix, last=self.last)


def _list_conversions(model: PreTrainedModel) -> list[WeightTransform]:
    """List how a model's weights are renamed when it is saved, as transformers would."""
    known = getattr(model, "_weight_conversions", None)
    if known is not None:
        return list(known)
    found = get_model_conversion_mapping(model, add_legacy=False)
    return [one for one in found if not isinstance(one, PrefixChange)]
