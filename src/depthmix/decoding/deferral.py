"""Generation in which layers put off work: what its ways have in common."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from jaxtyping import Int
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

from depthmix.attachment import explain_no_mixture, find_mixture_norm

ATTENTION = ("sdpa", "eager")
"""Attention implementations that take a mask over any queries and keys."""


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

    door: str
    """What errors say to leave out, so that generation is the model's own."""

    def __init__(self, model: nn.Module) -> None:
        norm = find_mixture_norm(model)
        mixture = norm.active_mixture if norm is not None else None
        if norm is None or mixture is None:
            raise ValueError(
                "`model` must have an active mixture of depths, which says how deep a token goes, "
                f"and {explain_no_mixture(model)}; leave out {self.door}, or load a model that was "
                "trained with one."
            )
        self.model: Any = model
        self.norm = norm
        self.mixture = mixture
        self._cache: Any = None
        self._streamer: Any = None

    def generate(self, *args: Any, streamer: Any = None, **kwargs: Any) -> Any:
        """Generate as the model's own `generate` does, with the same arguments and result.

        If it is interrupted, by an exception or Ctrl-C, a cache that was passed to it is of no use.

        Raises:
            RuntimeError: If another mixture, or none, is active by now.
            ValueError: If the way of decoding, the cache or the attention cannot be deferred, or
                something else calls the model meanwhile.
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
            RuntimeError: If another mixture, or none, is active by now.
            ValueError: If the way of decoding, the cache or the attention cannot be deferred, or
                something else calls the model meanwhile.
        """
        if self.norm.active_mixture is not self.mixture or self.norm.readout is not None:
            raise RuntimeError(
                f"{type(self).__name__} needs the mixture that was active when it was made to "
                "predict, and now another one, the base model or a late layer alone does; "
                f"activate its adapter, or make a new {type(self).__name__}."
            )
        cache = kwargs.get("past_key_values")
        outlives = generation_config.return_dict_in_generate or hasattr(cache, "_is_user_defined")
        check_deferrable(model, generation_config, cache, name=self.name, door=self.door)
        check_device(input_ids.device, outlives=outlives, name=self.name)
        self._cache = cache
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

    def _check_pass(self, kwargs: dict[str, Any]) -> None:
        """Refuse a pass that is not the decoding loop's."""
        cache = kwargs.get("past_key_values")
        if cache is not self._cache:
            raise ValueError(
                f"`past_key_values` must be the decoding loop's in each pass during "
                f"{self.name.lower()}, got {type(cache).__name__} of another call; let logits "
                f"processors and stopping criteria call another model, or leave out {self.door}."
            )

    @abstractmethod
    def _complete_cache(self) -> None:
        """Bring the cache to where the dense model would have it."""


@contextmanager
def replaced(module: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Let a module have another function under a name for a while.

    Args:
        module: Any module.
        name: The function's name in what the module itself holds.
        function: Called in its place.
    """
    own = vars(module).get(name)
    try:
        vars(module)[name] = function
        yield
    finally:
        vars(module).pop(name, None)
        if own is not None:
            vars(module)[name] = own


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
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"{name} needs greedy decoding or sampling, and `generate` was asked for "
            f"{mode.value.replace('_', ' ')}; leave out {door} for that."
        )
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
