"""What an adapter's file holds, and what PEFT's own ways of writing and reading make of it."""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType
from torch import Tensor, nn

from depthmix.adapters.config import MoDEConfig

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


def add_new_mixture(
    model: nn.Module, config: MoDEConfig, adapter_name: str, weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Let the mixture that an adapter was made with stand where its file is a LoRA adapter's.

    Args:
        model: The model with the adapter in place.
        config: Adapters and mixture.
        adapter_name: The adapter.
        weights: What the file gives, by the names in the model.

    Returns:
        The weights, with the mixture's as they are if `config` is from `MoDEConfig.from_adapter`.

    Raises:
        ValueError: If the file is a plain LoRA adapter's and a mixture's is expected, or the new
            mixture has no values yet.
    """
    own = {n: p.detach() for n, p in model.named_parameters() if f"{MIXTURE}{adapter_name}." in n}
    has_mixture = any(MIXTURE in name for name in weights)
    if has_mixture or not any(".lora_" in name for name in weights):
        return weights
    if not config.has_new_mixture:
        raise ValueError(
            "The adapter file is a plain LoRA adapter's and holds no mixture; to put a new one on "
            "top of it, load it by `PeftModel.from_pretrained(base, folder, "
            "config=MoDEConfig.from_adapter(folder), is_trainable=True)`."
        )
    if any(weight.is_meta for weight in own.values()):
        raise ValueError(
            "`low_cpu_mem_usage` gives a new mixture on top of a LoRA adapter no values to start "
            "from; leave it out."
        )
    return weights | own
