"""A layer that puts off work: the positions that it has yet to process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from depthmix.decoding.calls import join_calls, mask_missed


@dataclass(eq=False)
class LayerQueue:
    """A layer, and the positions that it has yet to process."""

    module: nn.Module

    index: int
    """Place of the layer among all and in the cache, from 0."""

    above: LayerQueue | None
    """The next layer, which takes what this one puts out."""

    names: list[str] = field(init=False)
    """Names of the parameters of the layer's forward pass."""

    forward: Callable[..., Any] = field(init=False)
    """The module's own forward pass."""

    gives_tuple: bool = field(default=False, init=False)
    """Whether the layer's output is a tuple."""

    inputs: list[Float[Tensor, "batch missed hidden"]] = field(default_factory=list, init=False)
    """What the layer below put out at those positions, as far as that one has run."""

    calls: list[dict[str, Any]] = field(default_factory=list, init=False)
    """What each pass handed over with those positions, beside the hidden states."""

    def __post_init__(self) -> None:
        self.names = list(signature(self.module.forward).parameters)

    def run(
        self,
        *,
        cache: DynamicCache,
        padding: Int[Tensor, "batch columns"] | None,
        masks: dict[Any, Any] | None = None,
    ) -> Float[Tensor, "batch missed hidden"]:
        """Process all positions that the layer has missed, and hand its outputs to the next one.

        Args:
            cache: The decoding loop's keys and values.
            padding: 0 where a row has no token, for all positions; `None` where each one has.
            masks: Masks of this pass that other layers have made; `None` takes the one that the
                model made, which fits where nothing had been put off.

        Returns:
            What the layer puts out there.
        """
        inputs = torch.cat(self.inputs, dim=1) if len(self.inputs) > 1 else self.inputs[0]
        call = join_calls(self.calls) if len(self.calls) > 1 else self.calls[0]
        if masks is not None:
            call = {**call, "attention_mask": self._make_mask(inputs, cache, padding, masks)}
        self.inputs, self.calls = [], []
        output = self.forward(inputs, **call)
        self.gives_tuple = isinstance(output, tuple)
        states = output[0] if isinstance(output, tuple) else output
        if self.above is not None:
            self.above.inputs.append(states)
        return states

    def wrap(self, states: Float[Tensor, "batch new hidden"]) -> Any:
        """Give states as the layer gives its output."""
        return (states,) if self.gives_tuple else states

    def _make_mask(
        self,
        inputs: Float[Tensor, "batch missed hidden"],
        cache: DynamicCache,
        padding: Int[Tensor, "batch columns"] | None,
        masks: dict[Any, Any],
    ) -> Any:
        """Make the mask of the missed positions, or take one that sees alike."""
        window = getattr(cache.layers[self.index], "sliding_window", None)
        seen = (cache.get_seq_length(self.index), inputs.shape[1], window, inputs.dtype)
        if seen not in masks:
            masks[seen] = mask_missed(inputs, cache=cache, index=self.index, padding=padding)
        return masks[seen]


def queue_layers(layers: Sequence[nn.Module], *, first: int = 0) -> list[LayerQueue]:
    """Make a queue for each layer from one on, each with the one above it.

    Args:
        layers: All layers of the model.
        first: Place of the lowest one that may put off work, from 0.
    """
    queues: list[LayerQueue] = []
    above = None
    for index in reversed(range(first, len(layers))):
        above = LayerQueue(layers[index], index, above)
        queues.insert(0, above)
    return queues
