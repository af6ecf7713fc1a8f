"""Which modules and parameters an adapter's options name, and options that name them in vain."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

from peft import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.transformers_weight_conversion import (
    convert_peft_config_for_transformers,
    get_model_conversion_mapping,
)
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from depthmix.adapters.config import MoDEConfig
from depthmix.adapters.files import as_lora

ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer."""

MIXTURE_PARTS = ("norms", "router", "exits")
"""What an adapter's mixture is made of."""


def rename_targets(config: MoDEConfig, model: PreTrainedModel) -> None:
    """Read names of targets from before transformers 5 as PEFT does, for LoRA alone.

    Args:
        config: Adapters and mixture; its targets and patterns are replaced.
        model: The model to adapt.
    """
    plain = as_lora(config)
    convert_peft_config_for_transformers(plain, model, get_model_conversion_mapping(model))
    for name in ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern"):
        setattr(config, name, getattr(plain, name))


def check_targets(config: MoDEConfig, model: nn.Module, *, is_new: bool) -> None:
    """Refuse targets that PEFT would pass over, and write expert parameters out in full.

    PEFT notices targets that match nothing only where the whole adapter matches nothing, and the
    final norm always matches.

    Args:
        config: Adapters and mixture, resolved for the model; its `target_parameters` are replaced
            by the full names of the parameters that get adapters.
        model: The model to adapt, with or without other adapters.
        is_new: Whether the adapter is made for this model, and not loaded onto it: PEFT saves
            `all-linear` written out, with names from layers that get no adapter.

    Raises:
        ValueError: If a target matches nothing, lies where no adapter goes, or is the final norm.
    """
    modules, parameters = _own_names(model)
    _check_match("target_modules", config.target_modules, modules)
    _check_final_norm(config, modules)
    if is_new:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        linear = {
            name.replace(".base_layer", "")
            for name, part in model.named_modules()
            if isinstance(part, nn.Linear | Conv1D) and part is not head
        }
        _check_layers(config, modules, linear & set(modules))
        _check_patterns(config, [*modules, *parameters])
    _check_match("target_parameters", config.target_parameters, parameters)
    if config.target_parameters:
        adapted = [name for name in parameters if config.adapts(name)]
        targets = config.target_parameters
        lost = [t for t in targets if not any(_is_target(name, [t]) for name in adapted)]
        if lost:
            raise ValueError(_lies_above([f"target_parameters={t!r}" for t in lost]))
        config.target_parameters = [name for name in adapted if _is_target(name, targets)]


def _own_names(model: nn.Module) -> tuple[list[str], list[str]]:
    """Name the modules and parameters that the model has without its adapters.

    PEFT's layers hold what they stand for as `base_layer`, one inside the other where a module has
    several adapted parameters, and their own weights beside it.
    """
    layers = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}

    def own(name: str) -> str | None:
        kept: list[str] = []
        path = ""
        for part in name.split("."):
            if path not in layers:
                kept.append(part)
            elif part != "base_layer":
                return None
            path = f"{path}.{part}" if path else part
        return ".".join(kept)

    names = ([n for n, _ in model.named_modules()], [n for n, _ in model.named_parameters()])
    modules, parameters = (list(dict.fromkeys(filter(None, map(own, some)))) for some in names)
    return modules, parameters


def _is_target(name: str, targets: Iterable[str]) -> bool:
    """Tell whether a module or parameter is named by its end, as PEFT names targets."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _check_match(argument: str, targets: Any, names: list[str]) -> None:
    """Refuse targets that match nothing."""
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


def _check_final_norm(config: MoDEConfig, names: list[str]) -> None:
    """Refuse to adapt or save the final norm: it is the mixture's, and PEFT would not notice."""
    name = config.final_norm
    assert name is not None  # resolved
    targets = config.target_modules
    everywhere = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    if targets and not everywhere and LoraModel._check_target_module_exists(config, name):
        raise ValueError(
            f"`target_modules` must not name the final norm {name}, which the mixture stands for "
            "and LoRA cannot adapt; leave it out, the late layers have norms of their own "
            "(`train_final_norm=True` gives the final layer one, too)."
        )
    for argument in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, argument):
            if [n for n in names if re.match(rf"(.*\.)?({pattern})$", n)] == [name]:
                raise ValueError(
                    f"`{argument}` must name modules that get LoRA adapters, and {pattern!r} names "
                    f"the final norm {name} alone, which the mixture stands for; leave it out."
                )
    parts = [name, f"{name}.base_layer", *(f"{name}.lora_mode.{part}" for part in MIXTURE_PARTS)]
    for module in config.modules_to_save or ():
        if any(part.endswith(module) for part in parts):
            raise ValueError(
                f"`modules_to_save` must not name the final norm {name}, which the mixture stands "
                f"for, or a part of the mixture, and {module!r} does; leave it out, since the "
                "mixture is trained and saved as it is (`train_final_norm=True` trains a norm for "
                "the final layer, too), or write more of the name where another module is meant."
            )


def _check_layers(config: MoDEConfig, names: list[str], linear: set[str]) -> None:
    """Refuse options that would adapt nothing: by layers that are none, or under `adapt="below"`.

    PEFT would not notice, since the final norm is adapted in any case.
    """
    targets, layers = config.target_modules, config.layers_to_transform
    if not targets:
        return
    layers = [layers] if isinstance(layers, int) else layers or []
    assert config.base_num_hidden_layers is not None
    if not config.layers_pattern and max(layers, default=0) >= config.base_num_hidden_layers:
        raise ValueError(
            "`layers_to_transform` must hold indices of layers from 0 to "
            f"{config.base_num_hidden_layers - 1}, as PEFT counts them, got {max(layers)}."
        )
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        config = copy.copy(config)
        config.target_modules = sorted(linear)
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
    for layer in layers:
        if not config.adapts(f"{config.decoder_layers}.{layer}"):
            lost.append(f"layers_to_transform={layer}")
    if lost:
        raise ValueError(_lies_above(lost))
    if not matched:
        others = ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
        given = ", ".join(f"`{n}`" for n in others if getattr(config, n) not in (None, [], set()))
        raise ValueError(
            f"`target_modules` must leave something to adapt, and nothing is left of {targets!r} "
            f"beside {given or 'the other options'}; `target_modules=[]` trains the mixture alone."
        )


def _check_patterns(config: MoDEConfig, names: list[str]) -> None:
    """Refuse ranks and scales for parts that the model does not have."""
    for argument in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, argument):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                raise ValueError(
                    f"`{argument}` must name adapted parts of the model, and {pattern!r} matches "
                    "none; `print(model)` shows the names."
                )


def _lies_above(targets: list[str]) -> str:
    return (
        f"`adapt='below'` puts no adapter into the late layers, and {', '.join(targets)} lies "
        "there alone; pass `adapt='all'`, or leave it out."
    )
