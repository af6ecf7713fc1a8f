"""What the releases of transformers that we serve name or do differently, asked of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer
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


def record_past(cache: Cache) -> Callable[[], None]:
    """Let a cache's sliding layers keep states that they may have to go back to.

    Such a layer shows its attention no more than its mask has, which layers before transformers
    5.18 have to be told: after two passes in a row without going back they show all they keep.

    Args:
        cache: The decoding loop's.

    Returns:
        What lets the layers be as they were.
    """
    layers: list[Any] = [layer for layer in cache.layers if hasattr(layer, "record_past")]
    recorded = {layer: layer.record_past for layer in layers}
    cache.activate_past_recording()
    if _shows_all_it_keeps():
        for layer in recorded:
            layer.update = partial(_update, layer)

    def undo() -> None:
        for layer, own in recorded.items():
            layer.record_past = own
            vars(layer).pop("update", None)

    return undo


def _shows_all_it_keeps() -> bool:
    """Ask a sliding layer that records whether it shows more than its window."""
    layer = DynamicSlidingWindowLayer(sliding_window=2)
    layer.activate_past_recording()
    state = torch.zeros(1, 1, 1, 1)
    shown = [layer.update(state, state)[0].shape[-2] for _ in range(3)]
    return shown[-1] > layer.sliding_window


def _update(layer: Any, keys: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """Take states in, and show what the layer's mask has."""
    length, _ = layer.get_mask_sizes(keys.shape[-2])
    shown = type(layer).update(layer, keys, *args, **kwargs)
    return tuple(states[..., -length:, :] for states in shown)
