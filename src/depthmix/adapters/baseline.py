"""The same adapters without the mixture, to compare with."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from depthmix.adapters.config import MoDEConfig
from depthmix.adapters.model import MoDEModel


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
    fields: dict[str, Any] = {
        name: copy.deepcopy(getattr(config, name)) for name in names - {"peft_type"}
    }
    targets = [name for name in tuner.targeted_module_names if name != resolved.final_norm]
    fields |= {"target_modules": targets, "target_parameters": resolved.target_parameters}
    return LoraConfig(**fields)
