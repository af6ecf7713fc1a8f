"""Generation in which layers put off work: what its ways have in common."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerationMode

from depthmix.attachment import find_mixture_norm

ATTENTION = ("sdpa", "eager")
"""Attention implementations that take a mask over any queries and keys."""

POSITION_ARGUMENTS = ("position_ids", "cache_position", "position_embeddings")
"""Arguments of a layer that hold something for each position."""


class Deferral(ABC):
    """Generation by transformers' own loop, while layers put off work.

    Subclasses stand in front of the layers, and give each step the dense model's logits.

    Args:
        model: A model with a mixture, by `attach` or as a PEFT adapter.

    Raises:
        ValueError: If the model has no active mixture.
    """

    name: str
    """What errors call this way of generating."""

    def __init__(self, model: nn.Module) -> None:
        norm = find_mixture_norm(model)
        mixture = norm.active_mixture if norm is not None else None
        if norm is None or mixture is None:
            raise ValueError(
                "`model` must have an active mixture of depths, which says how deep a token goes, "
                "got none; load an adapter, or leave `custom_generate` out."
            )
        self.model: Any = model
        self.norm = norm
        self.mixture = mixture
        self._cache: Any = None
        self._streamer: Any = None

    def generate(self, *args: Any, streamer: Any = None, **kwargs: Any) -> Any:
        """Generate as the model's own `generate` does, with the same arguments and result.

        Raises:
            ValueError: If the way of decoding, the cache or the attention cannot be deferred.
        """
        if kwargs.get("assistant_model") is not None:  # transformers would keep it from us
            raise ValueError(
                f"`assistant_model` cannot be combined with {self.name.lower()}; leave it out, or "
                "call the model's own `generate`."
            )
        self._streamer = streamer
        try:
            return self.model.generate(*args, custom_generate=self, **read_stop_strings(kwargs))
        finally:
            self._streamer = None

    def __call__(
        self,
        model: Any,
        input_ids: Int[Tensor, "batch seq"],
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> Any:
        """Decode in the place of transformers' own loop, which calls this.

        Raises:
            ValueError: If the way of decoding, the cache or the attention cannot be deferred.
        """
        cache = kwargs.get("past_key_values")
        check_deferrable(model, generation_config, cache, name=self.name)
        self._cache = cache
        outlives = generation_config.return_dict_in_generate or hasattr(cache, "_is_user_defined")
        if self._streamer is not None:
            self._streamer.put(input_ids.cpu())  # streamers expect the prompt first
        try:
            with self._deferring(model, input_ids, generation_config):
                output = model._sample(
                    input_ids,
                    generation_config=generation_config,
                    streamer=self._streamer,
                    **kwargs,
                )
                if outlives:
                    self._complete_cache()
        finally:
            self._cache = None
        return output

    @abstractmethod
    def _deferring(
        self,
        model: PreTrainedModel,
        input_ids: Int[Tensor, "batch seq"],
        generation_config: GenerationConfig,
    ) -> AbstractContextManager[None]:
        """Stand in front of the layers for a while."""

    @abstractmethod
    def _complete_cache(self) -> None:
        """Bring the cache to where the dense model would have it."""


def read_stop_strings(options: dict[str, Any]) -> dict[str, Any]:
    """Turn `stop_strings` into a stopping criterion, as transformers keeps the tokenizer from us.

    Args:
        options: Keyword arguments of `generate`.

    Returns:
        The same with the criterion in their place, where there are stop strings.

    Raises:
        ValueError: If there are stop strings and no `tokenizer`.
    """
    options = dict(options)
    tokenizer = options.pop("tokenizer", None)
    config = options.get("generation_config")
    strings = options.pop("stop_strings", None) or getattr(config, "stop_strings", None)
    if not strings:
        return options
    if tokenizer is None:
        raise ValueError(
            "`stop_strings` need the model's `tokenizer` beside them, got none; pass it to "
            "`generate`."
        )
    if config is not None:
        options["generation_config"] = config = copy.deepcopy(config)
        config.stop_strings = None
    criteria = [*(options.get("stopping_criteria") or ()), StopStringCriteria(tokenizer, strings)]
    return {**options, "stopping_criteria": StoppingCriteriaList(criteria)}


def read_call(
    module: nn.Module, names: list[str], args: tuple, kwargs: dict[str, Any], *, name: str
) -> dict[str, Any]:
    """Name what a layer was called with, beside its hidden states.

    Args:
        module: The layer.
        names: Its forward pass's parameters.
        args: What was passed by position, hidden states apart.
        kwargs: What was passed by name.
        name: What an error calls this way of generating.

    Raises:
        ValueError: If something among it has another form at other positions, as far as we know.
    """
    call = {**dict(zip(names[1:], args, strict=False)), **kwargs}
    unknown = [key for key, value in call.items() if isinstance(value, Tensor | tuple)]
    unknown = sorted(set(unknown) - {"attention_mask", *POSITION_ARGUMENTS})
    if unknown:
        raise ValueError(
            f"{name} cannot defer layers that take `{unknown[0]}`, as those of "
            f"{type(module).__name__} do; leave `custom_generate` out for this model."
        )
    return call


def join_calls(calls: list[dict[str, Any]]) -> dict[str, Any]:
    """Join what several passes handed to a layer into one call over all of their positions."""
    joined = dict(calls[-1])
    for name in POSITION_ARGUMENTS:
        parts: list[Any] = [call.get(name) for call in calls]
        if isinstance(parts[0], Tensor):
            joined[name] = torch.cat(parts, dim=-1)
        elif isinstance(parts[0], tuple):  # cosines and sines
            joined[name] = tuple(torch.cat(own, dim=-2) for own in zip(*parts, strict=True))
    return joined


def last_position(call: dict[str, Any]) -> dict[str, Any]:
    """Narrow a call of a layer to the last of its positions."""
    narrowed = dict(call)
    for name in POSITION_ARGUMENTS:
        part = call.get(name)
        if isinstance(part, Tensor):
            narrowed[name] = part[..., -1:]
        elif isinstance(part, tuple):  # cosines and sines
            narrowed[name] = tuple(own[..., -1:, :] for own in part)
    return narrowed


def mask_missed(
    inputs: Float[Tensor, "batch missed hidden"],
    *,
    cache: DynamicCache,
    index: int,
    padding: Int[Tensor, "batch seq"] | Bool[Tensor, "batch seq"] | None,
) -> Float[Tensor, "rows 1 missed keys"] | None:
    """Let each missed position see itself and what came before, as far as the layer looks.

    Args:
        inputs: What the layer takes in at the positions that it has missed.
        cache: Keys and values so far.
        index: The layer's place in the cache.
        padding: 0 where a row has no token, for all positions; `None` where each one has.

    Returns:
        What is added to the attention's logits, or `None` where everything is seen.
    """
    num_queries = inputs.shape[1]
    if num_queries == 1 and padding is None:
        return None
    first_query = cache.get_seq_length(index)
    num_keys, first_key = cache.get_mask_sizes(num_queries, index)
    queries = first_query + torch.arange(num_queries, device=inputs.device)[:, None]
    keys = first_key + torch.arange(num_keys, device=inputs.device)
    seen = keys <= queries  # (missed, keys)
    window = getattr(cache.layers[index], "sliding_window", None)
    if window is not None:
        seen = seen & (keys > queries - window)
    if padding is not None:
        own = padding[:, first_key : first_key + num_keys].to(inputs.device, torch.bool)
        seen = seen & own[:, None]  # (B, missed, keys)
    lowest = torch.full_like(seen, torch.finfo(inputs.dtype).min, dtype=inputs.dtype)
    return lowest.masked_fill(seen, 0.0).view(-1, 1, num_queries, num_keys)


def check_deferrable(
    model: PreTrainedModel, generation_config: GenerationConfig, cache: Any, *, name: str
) -> None:
    """Refuse what cannot be deferred exactly.

    Raises:
        ValueError: If the way of decoding, what it returns, the cache or the attention is such.
    """
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"{name} needs greedy decoding or sampling, and `generate` was asked for "
            f"{mode.value.replace('_', ' ')}; leave `custom_generate` out for that."
        )
    if generation_config.output_hidden_states or generation_config.output_attentions:
        raise ValueError(
            f"{name} has no hidden states or attentions of skipped layers to return; leave out "
            "`output_hidden_states` and `output_attentions`, or `custom_generate`."
        )
    layers = getattr(cache, "layers", [])
    if (
        type(cache) is not DynamicCache
        or cache.offloading
        or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    ):
        kinds = sorted({type(layer).__name__ for layer in layers})
        raise ValueError(
            f"{name} needs a plain `DynamicCache` of keys and values, got "
            f"{type(cache).__name__} of {', '.join(kinds) or 'nothing'}; leave out "
            "`cache_implementation`, or `custom_generate`."
        )
    attention = model.config.get_text_config()._attn_implementation
    if attention not in ATTENTION:
        raise ValueError(
            f"{name} needs attention by {' or '.join(ATTENTION)}, got {attention}; load the "
            "model with `attn_implementation='sdpa'`, or leave `custom_generate` out."
        )
