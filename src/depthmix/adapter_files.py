"""What an adapter's file holds, and what PEFT's own ways of writing and reading make of it."""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType
from torch import Tensor

from depthmix.adapter_config import MoDEConfig

MIXTURE = ".lora_mode."
"""Part of the names of a mixture's weights in an adapter."""


def as_lora(config: PeftConfig) -> Any:
    """Show a configuration to code of PEFT that asks for LoRA by the method's name.

    Args:
        config: Adapters and mixture; it is not changed.

    Returns:
        A copy that shares its fields and says `LORA`.
    """
    plain = copy.copy(config)
    plain.peft_type = PeftType.LORA
    return plain


def check_conversion(
    config: MoDEConfig, weights: dict[str, Tensor], initial_name: str, names: set[str]
) -> None:
    """Check that an adapter can be saved as the difference from its start.

    Args:
        config: Adapters and mixture.
        weights: What would be saved without a conversion.
        initial_name: Name of the folder that holds the start, as which PEFT loads it.
        names: Adapters of the model.

    Raises:
        ValueError: If the difference is another model, or PEFT would lose a part of the adapter
            or another adapter.
    """
    argument = "path_initial_model_for_weight_conversion"
    if not initial_name or initial_name in names:
        raise ValueError(
            f"`{argument}` must end in a folder that is called like no adapter of the model, since "
            f"PEFT loads the start under that name, got {initial_name!r}; rename the folder."
        )
    factors = (".lora_A.weight", ".lora_B.weight")
    others = [name for name in weights if MIXTURE not in name and not name.endswith(factors)]
    if config.init_lora_weights is False or config.init_lora_weights == "loftq":
        raise ValueError(
            f"`{argument}` needs an adapter whose start is the pretrained model, and "
            f"`init_lora_weights={config.init_lora_weights!r}` is none; leave it out, and the "
            "adapter is loaded as it was made."
        )
    if others or config.bias != "none" or config.target_parameters:
        what = others[0] if others else "biases or expert parameters"
        raise ValueError(
            f"`{argument}` converts LoRA's two factors alone, and the adapter has more ({what}), "
            "which would be lost; leave it out, and the adapter is loaded as it was made."
        )
