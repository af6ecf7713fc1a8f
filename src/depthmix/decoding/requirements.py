"""What a call must be like so that layers can be deferred exactly."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerationMode

ATTENTION = ("sdpa", "eager")
"""Attention implementations that take a mask over any queries and keys."""


def check_mode(generation_config: GenerationConfig, *, name: str, door: str) -> None:
    """Refuse other ways of decoding than the two whose loop ours are.

    Raises:
        ValueError: If it is neither greedy decoding nor sampling.
    """
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"{name} needs greedy decoding or sampling, and `generate` was asked for "
            f"{mode.value.replace('_', ' ')}; leave out {door} for that."
        )


def check_deferrable(
    model: PreTrainedModel,
    generation_config: GenerationConfig,
    cache: Any,
    *,
    name: str,
    door: str,
) -> None:
    """Refuse what cannot be deferred exactly.

    Raises:
        ValueError: If the way of decoding, what it returns, the cache or the attention is such.
    """
    check_mode(generation_config, name=name, door=door)
    if generation_config.guidance_scale not in (None, 1):
        raise ValueError(
            f"{name} cannot run the second pass of each step that `guidance_scale` asks for, got "
            f"{generation_config.guidance_scale}; leave it out, or {door}."
        )
    if generation_config.output_hidden_states or generation_config.output_attentions:
        raise ValueError(
            f"{name} has no hidden states or attentions of skipped layers to return; leave out "
            f"`output_hidden_states` and `output_attentions`, or {door}."
        )
    layers = getattr(cache, "layers", [])
    if (
        type(cache) is not DynamicCache
        or cache.offloading
        or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    ):
        raise ValueError(
            f"{name} needs a plain `DynamicCache` of keys and values, got "
            f"{type(cache).__name__} of {_name_kinds(layers)}; leave out "
            f"`cache_implementation`, or {door}."
        )
    config = model.config.get_text_config(decoder=True)
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError(
            f"{name} needs layers that attend to all before them or to a sliding window, and some "
            f"of {type(model).__name__} attend by chunks; leave out {door} for this model."
        )
    expected = DynamicCache(config=config).layers
    if list(map(type, layers)) != list(map(type, expected)):
        raise ValueError(
            f"`past_key_values` must have the model's own layers ({_name_kinds(expected)}), got "
            f"{_name_kinds(layers)}; make it by `DynamicCache(config=model.config)`."
        )
    attention = config._attn_implementation
    if attention not in ATTENTION:
        raise ValueError(
            f"{name} needs attention by {' or '.join(ATTENTION)}, got {attention}; load the "
            f"model with `attn_implementation='sdpa'`, or leave out {door}."
        )


def check_device(device: torch.device, *, outlives: bool, name: str) -> None:
    """Refuse to hand back a cache where transformers' loop takes its last step back by itself.

    Raises:
        ValueError: If the device is Apple's and the cache outlives the call.
    """
    if device.type == "mps" and outlives:
        raise ValueError(
            f"{name} cannot hand a cache back on the device mps, where transformers crops it "
            "meanwhile; leave out `return_dict_in_generate` and `past_key_values`."
        )


def _name_kinds(layers: list[Any]) -> str:
    """Name the kinds of a cache's layers, and how many there are of each."""
    kinds = Counter(type(layer).__name__ for layer in layers)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "nothing"
