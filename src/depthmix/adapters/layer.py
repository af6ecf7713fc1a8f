"""The adapters' mixtures in place of the final norm."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from depthmix.adapters.attach import install
from depthmix.adapters.config import MoDEConfig
from depthmix.loss.objective import Objective
from depthmix.method.backbone import Backbone
from depthmix.method.mixture import Mixture
from depthmix.method.norm import MixtureNorm
from depthmix.method.placement import META, find_device


class NoScale(dict):
    """A mixture has no scale such as LoRA's, which PEFT's LoRA-FA asks each adapted layer for."""

    def __contains__(self, adapter_name: object) -> bool:
        raise ValueError(
            "LoRA-FA takes all parameters of an adapter for pairs of LoRA's factors, and would "
            "train the mixture's norms and router wrongly or not at all; use another optimizer, or "
            "an adapter without a mixture (`LoraConfig`)."
        )


class MoDELayer(MixtureNorm, BaseTunerLayer):
    """A mixture per adapter in place of the final norm.

    Its attribute begins with "lora_": transformers puts the adapter's name behind the one prefix
    that a PEFT method registers.
    """

    adapter_layer_names = ("lora_mode",)
    lora_mode: nn.ModuleDict

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.lora_mode = nn.ModuleDict()
        self.scaling = NoScale()
        self.cast_input_dtype_enabled = True  # PEFT's helpers switch it on all adapted layers
        self.objective = Objective(self)

    @property
    def active_mixture(self) -> Mixture | None:
        """The active adapter's mixture; None while adapters are disabled."""
        return None if self.disable_adapters else self._choose(self.active_adapters)

    def update_layer(self, adapter_name: str, config: MoDEConfig) -> None:
        """Add an adapter's mixture."""
        self.lora_mode[adapter_name] = Mixture(
            config,
            final_norm=self.get_base_layer(),
            late_layers=config.resolve_late_layers(self.backbone.num_hidden_layers),
            hidden_size=self.backbone.hidden_size,
        )
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._watch()

    def make_ready(self, adapter_name: str) -> None:
        """Give an adapter's mixture values and float32 before a file is read into it.

        It may have neither: on a base on the meta device its norms have no values yet, and whoever
        cast the model to a narrower dtype cast the mixture, too. Parameters stay the objects that
        an optimiser holds, unless they had no values.
        """
        mixture = self.lora_mode[adapter_name]
        for module in mixture.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta:
                    empty = torch.empty_like(parameter, dtype=torch.float32, device="cpu")
                    setattr(module, name, nn.Parameter(empty, parameter.requires_grad))
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move an adapter's mixture to where the final norm computes, in float32.

        PEFT calls it whenever it makes or reads an adapter. Its own version takes the base's dtype
        over, in which what norms have learnt is lost to rounding.
        """
        mixture = self.lora_mode[adapter_name]
        device = device or find_device(self.get_base_layer())
        if device == META or any(parameter.is_meta for parameter in mixture.parameters()):
            device = None  # nothing to move yet, or nowhere to
        mixture.to(device=device, dtype=torch.float32)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Choose the active adapter; mixtures of several adapters do not add up."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        check_one_adapter([name for name in names if name in self.lora_mode])
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter's mixture, and stop capturing what only it read."""
        super().delete_adapter(adapter_name)
        self._watch()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Leave a plain mixture where the final norm stood (merge), or the norm itself."""
        mixture = self._choose(self.active_adapters if adapter_names is None else adapter_names)
        self.unwatch()
        self.objective.remove()
        vars(self.backbone.model).pop("_load_pretrained_model", None)  # of `load_weights`
        if not merge or mixture is None:
            return self.base_layer
        self.backbone.model.set_submodule(self.backbone.final_norm_name, self.base_layer)
        return install(self.backbone, mixture)

    def merge(self, *_args: Any, **_kwargs: Any) -> None:
        """Refuse: a mixture is no change of a weight that could be merged and unmerged.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "`merge_adapter` cannot merge a mixture into the final norm's weight; "
            "`merge_and_unload()` folds the LoRA weights and keeps the mixture as a plain module."
        )

    def unmerge(self) -> None:
        """Have nothing to unmerge, since nothing can be merged."""

    def _choose(self, names: list[str]) -> Mixture | None:
        """Give the mixture of the first of these adapters that has one."""
        for name in names:
            if name in self.lora_mode:
                mixture = self.lora_mode[name]
                assert isinstance(mixture, Mixture)
                return mixture
        return None

    def _watch(self) -> None:
        self.watch(m for m in self.lora_mode.values() if isinstance(m, Mixture))


def check_one_adapter(names: list[str]) -> None:
    """Refuse to make several mixtures active at once.

    Raises:
        ValueError: If there is more than one name.
    """
    if len(names) > 1:
        raise ValueError(
            f"`adapter_names` must name one MoDE adapter at a time, got {', '.join(names)}; "
            "routing weights of several adapters do not add up."
        )


def check_merge(norm: Any, names: Any, *, safe_merge: bool) -> None:
    """Check that an adapter can be merged, before the first layer has changed.

    Args:
        norm: The adapters' mixtures.
        names: The adapter to merge; none leaves the base model.
        safe_merge: Also check that all weights of its mixture are finite.

    Raises:
        TypeError: If the names are not a list.
        ValueError: If there is more than one name, no such adapter, or a weight is not finite.
    """
    if isinstance(names, str):
        raise TypeError(f"`adapter_names` must be a list of one name, got {names!r}.")
    check_one_adapter(names)
    for name in names:
        if name not in norm.lora_mode:
            raise ValueError(
                "`adapter_names` must name an adapter of the model, and it has "
                f"{', '.join(norm.lora_mode)}, got {name!r}."
            )
        weights = norm.lora_mode[name].parameters()
        if safe_merge and not all(weight.isfinite().all() for weight in weights):
            raise ValueError(
                "`safe_merge` found a weight that is not finite in the mixture of the adapter "
                f"{name!r}, which cannot be mended; load an earlier checkpoint."
            )
