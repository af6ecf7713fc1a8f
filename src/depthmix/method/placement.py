"""Where the parts of a model lie, and where they compute."""

from __future__ import annotations

from typing import TypeVar

import torch
from accelerate.utils import has_offloaded_params
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

Model = TypeVar("Model", bound=nn.Module)

META = torch.device("meta")
"""Where a tensor has a shape and no values."""


def find_device(module: nn.Module) -> torch.device | None:
    """Find where a module computes; its weights may lie elsewhere until then.

    Weights that accelerate offloads (to the CPU, to disk) are on the meta device between passes,
    and a hook brings them.

    Args:
        module: Any module without parts on several devices, such as a norm.

    Returns:
        The device; `None` for a module without parameters and hooks.
    """
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.empty(0, device=device).device
    parameter = next(module.parameters(), None)
    return None if parameter is None else parameter.device


def to_accelerator(model: Model) -> Model:
    """Move a model to the accelerator if there is one, else to the CPU, and give it back."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return model.to(accelerator or "cpu")


def check_base_files(model: PreTrainedModel) -> None:
    """Refuse an adapter where PEFT would write to its base's files.

    As PEFT loads an adapter onto a base that lies partly on disk, it takes accelerate's hooks away
    and writes the base's weights anew under names of its own: into the file that they came from, if
    that was named by a relative path, else into a copy below the working directory.

    Args:
        model: The base, before it gets an adapter.

    Raises:
        ValueError: If parts of it lie on disk, and no hook brings them any more.
    """
    places = getattr(model, "hf_device_map", None) or {}
    parts = [name for name, place in places.items() if place == "disk"]
    if parts and not any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ValueError(
            f"`device_map` must put nothing on disk where PEFT loads an adapter, which would write "
            f"over the base's weight file, and {', '.join(parts)} lies there; load the base anew "
            "with another `device_map`."
        )


def check_adapted(model: PreTrainedModel, final_norm: str) -> None:
    """Refuse adapter weights beside weights that are offloaded, where they have no values.

    Args:
        model: A model with an adapter.
        final_norm: Full name of the final norm, which may be offloaded: its mixture lies where it
            computes.

    Raises:
        ValueError: If what has LoRA weights or a trained copy is offloaded, to the CPU or to disk.
    """
    for name, module in model.named_modules():
        is_offloaded = any(map(has_offloaded_params, module.modules()))
        is_adapted = isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        if is_adapted and is_offloaded and name != final_norm:
            raise ValueError(
                f"`device_map` must offload nothing that an adapter changes, and {name} is "
                "offloaded; keep it on a device."
            )
