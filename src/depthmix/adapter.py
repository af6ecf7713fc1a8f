"""MoDE as a PEFT method: `MODE_LORA`, any LoRA variant under a mixture of depths."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from peft.utils import register_peft_method
from torch import Tensor, nn
from transformers import PreTrainedModel

from depthmix.adapter_config import MODE_LORA, MoDEConfig
from depthmix.adapter_layer import MoDELayer, check_one_adapter
from depthmix.architecture import find_backbone
from depthmix.attachment import find_mixture_norm
from depthmix.backbone import Backbone
from depthmix.mixture_norm import MoDENorm

ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer."""


class MoDEModel(LoraModel):
    """LoRA in the layers, and a mixture of depths in place of the final norm."""

    prefix = "lora_"
    tuner_layer_cls = (LoraLayer, MoDELayer)  # pyrefly: ignore[bad-assignment]

    def _prepare_adapter_config(self, peft_config: MoDEConfig, model_config: dict) -> MoDEConfig:
        """Fill in and check a copy of the configuration; the user's own serves other models too."""
        peft_config.check_base(self.model)
        is_new = peft_config.base_num_hidden_layers is None
        backbone = self._find_backbone(peft_config)
        name = next(name for name, c in self.peft_config.items() if c is peft_config)
        peft_config = self.peft_config[name] = copy.copy(peft_config)
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        peft_config.resolve(backbone)
        modules = [name for name, _ in self.model.named_modules()]
        parameters = [n.replace(".base_layer.", ".") for n, _ in self.model.named_parameters()]
        _check_targets("target_modules", peft_config.target_modules, modules)
        if is_new:  # PEFT saves `all-linear` written out
            _check_layers(peft_config, modules)
        _check_targets("target_parameters", peft_config.target_parameters, parameters)
        if peft_config.target_parameters:
            adapted = [name for name in parameters if peft_config.adapts(name)]
            targets = peft_config.target_parameters
            lost = [t for t in targets if not any(_is_target(name, [t]) for name in adapted)]
            if lost:
                raise ValueError(_lies_above([f"target_parameters={t!r}" for t in lost]))
            peft_config.target_parameters = [n for n in adapted if _is_target(n, targets)]
        return peft_config

    def _find_backbone(self, peft_config: MoDEConfig) -> Backbone:
        """Find the model's parts; what a saved adapter names was verified when it was made."""
        return find_backbone(
            self.model,
            final_norm=peft_config.final_norm,
            decoder_layers=peft_config.decoder_layers,
            probe=peft_config.base_num_hidden_layers is None,
        )

    @staticmethod
    def _check_target_module_exists(  # pyrefly: ignore[bad-override]
        peft_config: MoDEConfig, key: str
    ) -> Any:
        if key == peft_config.final_norm:
            return True
        found = LoraModel._check_target_module_exists(peft_config, key)
        return False if found and not peft_config.adapts(key) else found

    def _create_and_replace(
        self,
        lora_config: MoDEConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        if current_key != lora_config.final_norm:
            super()._create_and_replace(
                lora_config,
                adapter_name,
                target,
                target_name,
                parent,
                current_key,
                parameter_name=parameter_name,
            )
            return
        layer = target
        if isinstance(layer, MoDENorm):
            raise RuntimeError(
                "The model has an attached or merged mixture already; call `detach(model)` before "
                "it gets a MoDE adapter."
            )
        if not isinstance(layer, MoDELayer):
            layer = MoDELayer(self._find_backbone(lora_config))
            layer.train(target.training)
            setattr(parent, target_name, layer)
        layer.update_layer(adapter_name, lora_config)
        if adapter_name not in self.active_adapters:
            layer.lora_mode[adapter_name].requires_grad_(False)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        marker = f".lora_mode.{adapter_name}."
        if marker in key:
            return key.replace(marker, ".lora_mode.")
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MoDEConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Map a checkpoint to the model, and refuse one that lacks weights."""
        remapped = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        missing = [
            name
            for name, _ in model.named_parameters()
            if _belongs_to(name, adapter_name)
            and name not in remapped
            and f"base_model.model.{name}" not in remapped
        ]
        if missing:
            raise ValueError(
                f"The adapter file lacks {len(missing)} of the adapter's tensors (the first is "
                f"{missing[0]}); it is damaged or was made with other options: save it again."
            )
        return remapped

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Choose the active adapter; refuse several before the first layer has changed."""
        check_one_adapter([adapter_name] if isinstance(adapter_name, str) else adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and activate another where it was the active one."""
        super().delete_adapter(adapter_name)
        # PEFT asks the first adapted layer, which need not have all adapters; the mixture has.
        norm = find_mixture_norm(self.model)
        if isinstance(norm, MoDELayer) and norm.active_adapters:
            self.set_adapter(norm.active_adapters)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "`adapter_names` cannot mix adapters in one batch: a mixture routes the whole "
                "batch; call `set_adapter` and run each adapter's rows by themselves."
            )
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            yield

    def merge_adapter(self, *_args: Any, **_kwargs: Any) -> None:
        """Refuse: a mixture is no change of a weight that could be merged and unmerged.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "`merge_adapter` cannot merge a mixture into the final norm's weight; "
            "`merge_and_unload()` folds the LoRA weights and keeps the mixture as a plain module."
        )

    def add_weighted_adapter(self, *_args: Any, **_kwargs: Any) -> None:
        """Refuse: routers and norms of several adapters cannot be averaged like LoRA's products.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "`add_weighted_adapter` cannot combine mixtures; combine plain LoRA adapters before "
            "a mixture is trained on top."
        )


def _belongs_to(parameter_name: str, adapter_name: str) -> bool:
    """Tell whether a parameter of the model is part of an adapter."""
    if ".lora_mode." in parameter_name:
        return f".lora_mode.{adapter_name}." in parameter_name
    return ".lora_" in parameter_name and adapter_name in parameter_name.split(".")[-2:]


def _is_target(name: str, targets: Iterable[str]) -> bool:
    """Tell whether a module or parameter is named by its end, as PEFT names targets."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _check_targets(argument: str, targets: Any, names: list[str]) -> None:
    """Refuse targets that match nothing; PEFT would not notice, since the final norm matches."""
    if not targets:
        return
    if isinstance(targets, str):
        if targets.lower() == ALL_LINEAR or any(re.fullmatch(targets, n) for n in names):
            return
        raise ValueError(
            f"`{argument}` as one text is a regular expression for whole names, and {targets!r} "
            f"matches none of the model's; a list names parts by their end: [{targets!r}]."
        )
    unmatched = sorted(t for t in targets if not any(_is_target(n, [t]) for n in names))
    if unmatched:
        raise ValueError(
            f"`{argument}` must name parts of the model, and it has none called "
            f"{', '.join(unmatched)}; `print(model)` shows the names."
        )


def _check_layers(config: MoDEConfig, names: list[str]) -> None:
    """Refuse targets that lie in the late layers alone, where `adapt="below"` puts no adapter."""
    targets, layers = config.target_modules, config.layers_to_transform
    if not targets or (isinstance(targets, str) and targets.lower() == ALL_LINEAR):
        return
    matched = [
        name
        for name in names
        if name != config.final_norm and LoraModel._check_target_module_exists(config, name)
    ]
    adapted = [name for name in matched if config.adapts(name)]
    lost: list[str] = []
    if isinstance(targets, str):
        lost = [] if adapted or not matched else [f"target_modules={targets!r}"]
    else:
        for target in sorted(targets):
            named = [name for name in matched if _is_target(name, [target])]
            if named and not any(name in adapted for name in named):
                lost.append(f"target_modules={target!r}")
    for layer in [layers] if isinstance(layers, int) else layers or []:
        if not config.adapts(f"{config.decoder_layers}.{layer}"):
            lost.append(f"layers_to_transform={layer}")
    if lost:
        raise ValueError(_lies_above(lost))


def _lies_above(targets: list[str]) -> str:
    return (
        f"`adapt='below'` puts no adapter into the late layers, and {', '.join(targets)} lies "
        "there alone; pass `adapt='all'`, or leave it out."
    )


def to_lora(config: MoDEConfig, model: PreTrainedModel) -> LoraConfig:
    """Configure the same adapters in the same layers without the mixture, as a baseline.

    Args:
        config: Adapters and mixture.
        model: The model to adapt; only its configuration is read.

    Returns:
        A plain LoRA configuration that names its targets in full.
    """
    with torch.device("meta"):
        shape = type(model)(model.config)
    tuner = MoDEModel(shape, config, "default")
    resolved: Any = tuner.peft_config["default"]
    names = {field.name for field in dataclasses.fields(LoraConfig) if field.init}
    fields: dict[str, Any] = {name: getattr(config, name) for name in names - {"peft_type"}}
    targets = [name for name in tuner.targeted_module_names if name != resolved.final_norm]
    fields |= {"target_modules": targets, "target_parameters": resolved.target_parameters}
    return LoraConfig(**fields)


def register() -> None:
    """Make `MODE_LORA` known to PEFT, once."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING

    if MODE_LORA in PEFT_TYPE_TO_CONFIG_MAPPING:
        return
    register_peft_method(
        name="mode_lora", config_cls=MoDEConfig, model_cls=MoDEModel, prefix=MoDEModel.prefix
    )
    assert PEFT_TYPE_TO_PREFIX_MAPPING[MODE_LORA] == MoDEModel.prefix
