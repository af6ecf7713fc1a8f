"""Decoding that runs a late layer only when a token needs it, with the result of running all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float, Int
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


@dataclass
class LateLayer:
    """A late layer, and the positions that it has yet to process."""

    module: nn.Module

    index: int
    """Its place among the layers and in the cache."""

    above: LateLayer | None
    """The next late layer, which takes what this one puts out."""

    forward: Callable[..., Any] = field(init=False)
    """The module's own forward pass."""

    inputs: list[Float[Tensor, "batch missed hidden"]] = field(default_factory=list)
    """What the layer below put out at those positions, as far as that one has run."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    """What each pass handed over with those positions."""


class LazyDepth:
    r"""Exact generation with skipped layers: `LazyDepth(model).generate(**inputs)`.

    Routing depends on $h_{n-k}$ alone, so the deepest route that a token keeps is known before the
    late layers run, and a late layer above it does not run. It processes the positions that it has
    missed in one pass over all of them, as soon as a token needs its output. So keys and values
    are those of the dense model, and so are the tokens (docs/lazy-depth.md). A prompt is deferred
    in the same way. What is saved depends on `top_k` and on what the router has learnt; with dense
    routing every token needs every layer.

    Greedy decoding and sampling work, batched and left-padded, with logits processors, stopping
    criteria and streamers. While it generates, the model must not be used from another thread.
    `model.generate(…, custom_generate=LazyDepth(model))` does the same, except that transformers
    keeps a streamer from it.

    Args:
        model: A model with a mixture, by `attach` or as a PEFT adapter.

    Raises:
        ValueError: If the model has no active mixture.
    """

    def __init__(self, model: nn.Module) -> None:
        norm = find_mixture_norm(model)
        mixture = norm.active_mixture if norm is not None else None
        if norm is None or mixture is None:
            raise ValueError(
                "`model` must have an active mixture of depths, which says how deep a token goes, "
                "got none; load an adapter, or leave `custom_generate` out."
            )
        self.model: Any = model
        self.mixture = mixture
        self.num_passes = 0
        self.num_late_runs = 0
        modules = norm.backbone.layers
        self._layers: list[LateLayer] = []
        for index in reversed(range(mixture.late_layers[0] - 1, len(modules))):
            above = self._layers[0] if self._layers else None
            self._layers.insert(0, LateLayer(modules[index], index, above))
        self._needed = 0
        self._gives_tuple = False
        self._cache: Any = None
        self._streamer: Any = None
        self._padding: Int[Tensor, "batch seq"] | None = None

    @property
    def layers_per_pass(self) -> float:
        """Layers that ran in the mean forward pass, a prompt being one pass."""
        return self._layers[0].index + self.num_late_runs / max(self.num_passes, 1)

    def generate(self, *args: Any, streamer: Any = None, **kwargs: Any) -> Any:
        """Generate as the model's own `generate` does, with the same arguments and result.

        Raises:
            ValueError: If the way of decoding, the cache or the attention cannot be deferred.
        """
        if kwargs.get("assistant_model") is not None:  # transformers would keep it from us
            raise ValueError(
                "`assistant_model` cannot be combined with lazy depth; leave it out, or call the "
                "model's own `generate`."
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
        check_deferrable(model, generation_config, cache)
        self._cache = cache
        outlives = generation_config.return_dict_in_generate or hasattr(cache, "_is_user_defined")
        if self._streamer is not None:
            self._streamer.put(input_ids.cpu())  # streamers expect the prompt first
        with self._deferring(model):
            output = model._sample(
                input_ids,
                generation_config=generation_config,
                streamer=self._streamer,
                **kwargs,
            )
            if outlives:
                for layer in self._layers[1:]:
                    if layer.calls:
                        self._run(layer)
        return output

    @contextmanager
    def _deferring(self, model: PreTrainedModel) -> Iterator[None]:
        """Stand in front of the late layers for a while."""
        handle = model.register_forward_pre_hook(self._begin, with_kwargs=True)
        patched: dict[int, Any] = {
            layer.index: vars(layer.module).get("forward") for layer in self._layers
        }
        for layer in self._layers:
            layer.forward = layer.module.forward
            names = list(signature(layer.forward).parameters)
            layer.module.forward = partial(self._forward, layer, names)
        try:
            yield
        finally:
            handle.remove()
            for layer in self._layers:
                del layer.module.forward
                if patched[layer.index] is not None:
                    layer.module.forward = patched[layer.index]
                layer.inputs, layer.calls = [], []

    def _begin(self, _model: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
        """Note a pass's padding, from which masks are made."""
        self._padding = kwargs.get("attention_mask")  # None where there is no padding
        self.num_passes += 1

    def _forward(
        self,
        layer: LateLayer,
        names: list[str],
        hidden_states: Float[Tensor, "batch new hidden"],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Run a late layer if this pass needs it, and else remember what it has missed."""
        call = {**dict(zip(names[1:], args, strict=False)), **kwargs}
        unknown = [name for name, value in call.items() if isinstance(value, Tensor | tuple)]
        unknown = sorted(set(unknown) - {"attention_mask", *POSITION_ARGUMENTS})
        if unknown:
            raise ValueError(
                f"Lazy depth cannot defer layers that take `{unknown[0]}`, as those of "
                f"{type(layer.module).__name__} do; leave `custom_generate` out for this model."
            )
        if layer is self._layers[0]:
            weights = self.mixture.weigh(hidden_states[:, -1:])[:, 0]  # (B, k)
            deepest = int((weights > 0).any(0).nonzero().max())
            self._needed = self.mixture.late_layers[deepest] - 1
            layer.inputs.append(hidden_states)
        layer.calls.append(call)
        output = hidden_states  # where nobody looks at it: its routing weight is 0
        if layer.index <= self._needed:
            output = self._run(layer)[:, -hidden_states.shape[1] :]
        return (output,) if self._gives_tuple else output

    def _run(self, layer: LateLayer) -> Float[Tensor, "batch missed hidden"]:
        """Process all positions that a layer has missed, and hand its outputs to the next one."""
        inputs = torch.cat(layer.inputs, dim=1) if len(layer.inputs) > 1 else layer.inputs[0]
        call = join_calls(layer.calls) if len(layer.calls) > 1 else layer.calls[0]
        if layer is not self._layers[0]:
            call = {**call, "attention_mask": self._mask(layer, inputs)}
        layer.inputs, layer.calls = [], []
        output = layer.forward(inputs, **call)
        self._gives_tuple = isinstance(output, tuple)
        hidden_states = output[0] if isinstance(output, tuple) else output
        if layer.above is not None:
            layer.above.inputs.append(hidden_states)
        self.num_late_runs += 1
        return hidden_states

    def _mask(
        self, layer: LateLayer, inputs: Float[Tensor, "batch missed hidden"]
    ) -> Float[Tensor, "rows 1 missed keys"] | None:
        """Let each missed position see itself and what came before, as far as the layer looks."""
        num_queries, cache = inputs.shape[1], self._cache
        if num_queries == 1 and self._padding is None:
            return None
        first_query = cache.get_seq_length(layer.index)
        num_keys, first_key = cache.get_mask_sizes(num_queries, layer.index)
        queries = first_query + torch.arange(num_queries, device=inputs.device)[:, None]
        keys = first_key + torch.arange(num_keys, device=inputs.device)
        seen = keys <= queries  # (missed, keys)
        window = getattr(cache.layers[layer.index], "sliding_window", None)
        if window is not None:
            seen = seen & (keys > queries - window)
        if self._padding is not None:
            own = self._padding[:, first_key : first_key + num_keys].to(inputs.device, torch.bool)
            seen = seen & own[:, None]  # (B, missed, keys)
        lowest = torch.full_like(seen, torch.finfo(inputs.dtype).min, dtype=inputs.dtype)
        return lowest.masked_fill(seen, 0.0).view(-1, 1, num_queries, num_keys)


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


def check_deferrable(
    model: PreTrainedModel, generation_config: GenerationConfig, cache: Any
) -> None:
    """Refuse what cannot be deferred exactly.

    Raises:
        ValueError: If the way of decoding, what it returns, the cache or the attention is such.
    """
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            "Lazy depth needs greedy decoding or sampling, and `generate` was asked for "
            f"{mode.value.replace('_', ' ')}; leave `custom_generate` out for that."
        )
    if generation_config.output_hidden_states or generation_config.output_attentions:
        raise ValueError(
            "Lazy depth has no hidden states or attentions of skipped layers to return; leave out "
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
            "Lazy depth needs a plain `DynamicCache` of keys and values, got "
            f"{type(cache).__name__} of {', '.join(kinds) or 'nothing'}; leave out "
            "`cache_implementation`, or `custom_generate`."
        )
    attention = model.config.get_text_config()._attn_implementation
    if attention not in ATTENTION:
        raise ValueError(
            f"Lazy depth needs attention by {' or '.join(ATTENTION)}, got {attention}; load the "
            "model with `attn_implementation='sdpa'`, or leave `custom_generate` out."
        )
