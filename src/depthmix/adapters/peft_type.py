"""The name of the method in PEFT, which a file must bear for its mixture to be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType

from depthmix.method.config import MixtureConfig


def add_peft_type(name: str) -> PeftType:
    """Add a member to PEFT's enumeration of methods, which is how other packages join it.

    The name must not be part of "model" in lower case, or transformers takes every base weight
    for an adapter's: "MODE" would be, "MODE_LORA" is not.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member.__dict__["_value_"] = name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


MODE_LORA = add_peft_type("MODE_LORA")
"""PEFT's name of the method."""


def check_type(settings: Mapping[str, Any]) -> None:
    """Refuse the settings of an adapter with a mixture under another method's name.

    PEFT would take the file for that method's, and drop the mixture.

    Args:
        settings: What an `adapter_config.json` holds.

    Raises:
        ValueError: If they are a mixture's, and `peft_type` is not `MODE_LORA`.
    """
    given: Any = settings.get("peft_type")
    reader = PEFT_TYPE_TO_CONFIG_MAPPING.get(given, PeftConfig)
    is_mixture = not settings.keys().isdisjoint(("late_layers", "router_init"))
    if is_mixture and not issubclass(reader, MixtureConfig):
        raise ValueError(
            f"`peft_type` must be {MODE_LORA.value} in the adapter_config.json of an adapter with "
            f"a mixture, got {given}, under which the mixture would be dropped; set it back, or "
            "make a plain LoRA adapter with `depthmix.to_lora`."
        )
