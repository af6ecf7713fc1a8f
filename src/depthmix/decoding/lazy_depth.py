"""Decoding that runs a late layer only when a token needs it, with the result of running all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from depthmix.decoding.calls import join_calls, mask_missed, read_call
from depthmix.decoding.deferral import Deferral, replaced


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
    """What each pass handed over with those positions, masks above the first late layer apart."""


class LazyDepth(Deferral):
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

    name = "Lazy depth"
    door = "`lazy` or `custom_generate`"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.num_passes = 0
        self.num_late_runs = 0
        modules = self.norm.backbone.layers
        self._layers: list[LateLayer] = []
        for index in reversed(range(self.mixture.late_layers[0] - 1, len(modules))):
            above = self._layers[0] if self._layers else None
            self._layers.insert(0, LateLayer(modules[index], index, above))
        self._needed = 0
        self._weigh: Any = None
        self._weights: Float[Tensor, "batch new routes"] | None = None
        self._gives_tuple = False
        self._padding: Int[Tensor, "batch seq"] | None = None

    @property
    def layers_per_pass(self) -> float:
        """Layers that ran in the mean forward pass, a prompt being one pass."""
        return self._layers[0].index + self.num_late_runs / max(self.num_passes, 1)

    @contextmanager
    def _deferring(
        self,
        model: PreTrainedModel,
        input_ids: Int[Tensor, "batch seq"],
        generation_config: GenerationConfig,
    ) -> Iterator[None]:
        """Stand in front of the late layers for a while."""
        self._weigh = self.mixture.weigh
        try:
            with ExitStack() as stack:
                handle = model.register_forward_pre_hook(self._begin, with_kwargs=True)
                stack.callback(handle.remove)
                # A second product might round to other routes than those that ran.
                weigh = replaced(self.mixture, "weigh", lambda _router_input: self._weights)
                stack.enter_context(weigh)
                for layer in self._layers:
                    layer.forward = layer.module.forward
                    names = list(signature(layer.forward).parameters)
                    forward = partial(self._forward, layer, names)
                    stack.enter_context(replaced(layer.module, "forward", forward))
                yield
        finally:
            self._weigh = self._weights = self._padding = None
            for layer in self._layers:
                layer.inputs, layer.calls = [], []

    def _complete_cache(self) -> None:
        """Let each late layer process what it has missed."""
        for layer in self._layers[1:]:
            if layer.calls:
                self._run(layer)

    def _begin(self, _model: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
        """Note a pass's padding, from which masks are made."""
        self._check_pass(kwargs)
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
        call = read_call(layer.module, names, args, kwargs, name=self.name, door=self.door)
        if layer is self._layers[0]:
            # Layers may sit on several devices; the mixture lives on one.
            self._weights = self._weigh(hidden_states.to(self.mixture.router.weight.device))
            deepest = int((self._weights[:, -1] > 0).any(0).nonzero().max())
            self._needed = self.mixture.late_layers[deepest] - 1
            layer.inputs.append(hidden_states)
        else:
            call.pop("attention_mask", None)  # made anew for all that the layer has missed
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
            mask = mask_missed(inputs, cache=self._cache, index=layer.index, padding=self._padding)
            call = {**call, "attention_mask": mask}
        layer.inputs, layer.calls = [], []
        output = layer.forward(inputs, **call)
        self._gives_tuple = isinstance(output, tuple)
        hidden_states = output[0] if isinstance(output, tuple) else output
        if layer.above is not None:
            layer.above.inputs.append(hidden_states)
        self.num_late_runs += 1
        return hidden_states
