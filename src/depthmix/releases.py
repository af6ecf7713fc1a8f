"""What the releases of transformers that we serve name or do differently, asked of them."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.utils import quantization_config

CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing"
)
"""How the options and methods of it begin: transformers 5.23 has renamed them."""


def dequantising() -> dict[str, Any]:
    """Ask for a GGUF file's weights as they are computed with.

    Returns:
        Arguments of `from_pretrained`; none before transformers 5.17, which brought the choice and
        dequantised every such file until then.
    """
    choice = getattr(quantization_config, "GgufConfig", None)
    return {} if choice is None else {"quantization_config": choice(dequantize=True)}


def says_it_is_scaled(trainer: Any) -> bool | None:
    """Ask a trainer whether it takes its loss as a share of the accumulated batch.

    Args:
        trainer: Any `Trainer`.

    Returns:
        What it says; `None` if nothing, as before transformers 5.19.
    """
    return getattr(trainer, "loss_is_scaled_for_ga", None)
