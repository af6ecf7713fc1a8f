"""Decoding that runs a late layer only when a token needs it, with the result of running all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig

from depthmix.decoding.deferral import Deferral
from depthmix.decoding.layer_queue import LayerQueue, queue_layers
from depthmix.decoding.stand_ins import Claim
from depthmix.method.norm import active_mixture, explain_no_mixture


class LazyDepth(Deferral):
    r"""Exact generation with skipped layers: `LazyDepth(model).generate(**inputs)`.

    Routing depends on $h_{n-k}$ alone, so the deepest route that a token keeps is known before the
    late layers run, and a late layer above it does not run. It processes the positions that it has
    missed in one pass over all of them, as soon as a token needs its output. So keys and values
    are those of the dense model, and so are the tokens (docs/drafting.md). A prompt is deferred
    in the same way. What is saved depends on `top_k` and on what the router has learnt; with dense
    routing every token needs every layer.

    Greedy decoding and sampling work, batched and left-padded, with logits processors, stopping
    criteria and streamers. While it generates, another call may use the model as ever, but not
    defer its layers. `model.generate(…, custom_generate=LazyDepth(model))` does the same, except
    that transformers keeps a streamer from it.

    Args:
        model: A model with a mixture, by `attach` or as a PEFT adapter.

    Raises:
        ValueError: If the model has no active mixture.
    """

    name = "Lazy depth"
    door = "`lazy` or `custom_generate`"

    def __init__(self, model: nn.Module) -> None:
        if active_mixture(model) is None:
            raise ValueError(
                "`model` must have an active mixture of depths, which says how deep a token goes, "
                f"and {explain_no_mixture(model)}; leave out {self.door}, or load a model that was "
                "trained with one."
            )
        super().__init__(model)
        self.num_passes = 0
        self.num_late_runs = 0
        self._layers: list[LayerQueue] = []
        self._needed = 0
        self._weights: Float[Tensor, "batch new routes"] | None = None

    @property
    def layers_per_pass(self) -> float:
        """Layers that ran in the mean forward pass, a prompt being one pass."""
        return self.mixture.late_layers[0] - 1 + self.num_late_runs / max(self.num_passes, 1)

    def _claim(self) -> Sequence[Claim]:
        """Stand in front of the late layers, and of the router's softmax."""
        layers = self.backbone.layers
        first = self.mixture.late_layers[0] - 1
        fronts = [
            (layers[index], "forward", partial(self._forward, index - first))
            for index in range(first, len(layers))
        ]
        return [(self.mixture, "weigh", self._weigh_once), *fronts]

    def _begin(
        self, input_ids: Int[Tensor, "batch seq"], config: GenerationConfig, streamer: Any
    ) -> Any:
        """Take the late layers as the model has them now."""
        self._layers = queue_layers(self._modules, first=self.mixture.late_layers[0] - 1)
        return streamer

    def _forget(self) -> None:
        """Let go of what was put off."""
        self._layers = []
        self._weights = None

    def _complete_cache(self) -> None:
        """Let each late layer process what it has missed."""
        for layer in self._layers[1:]:
            if layer.calls:
                self._run(layer)

    def _step(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a pass, in which late layers see for themselves whether they are needed."""
        self.num_passes += 1
        self._weights = None
        return forward(*args, **kwargs)

    def _weigh_once(
        self,
        weigh: Callable[..., Any],
        router_input: Float[Tensor, "batch new hidden"],
    ) -> Float[Tensor, "batch new routes"]:
        """Route a pass once: a second product might round to other routes than those that ran."""
        if self._weights is None:
            self._weights = weigh(router_input)
        return self._weights

    def _forward(
        self,
        place: int,
        forward: Callable[..., Any],
        hidden_states: Float[Tensor, "batch new hidden"],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Run a late layer if this pass needs it, and else remember what it has missed."""
        layer = self._layers[place]
        layer.forward = forward
        call = self._read_call(layer.module, layer.names, args, kwargs)
        if not layer.calls:  # with nothing put off, the model's mask is for the same positions
            self._check_mask(layer.module, layer.index, hidden_states, call)
        if place == 0:
            # Layers may sit on several devices; the mixture lives on one.
            weights = self.mixture.weigh(hidden_states.to(self.mixture.router.weight.device))
            deepest = int((weights[:, -1] > 0).any(0).nonzero().max())
            self._needed = self.mixture.late_layers[deepest] - 1
            layer.inputs.append(hidden_states)
        else:
            call.pop("attention_mask", None)  # made anew for all that the layer has missed
        layer.calls.append(call)
        output = hidden_states  # where nobody looks at it: its routing weight is 0
        if layer.index <= self._needed:
            output = self._run(layer)[:, -hidden_states.shape[1] :]
        return self._layers[0].wrap(output)  # the lowest always runs

    def _run(self, layer: LayerQueue) -> Float[Tensor, "batch missed hidden"]:
        """Process all positions that a layer has missed."""
        self.num_late_runs += 1
        masks = None if layer is self._layers[0] else {}
        return layer.run(cache=self._cache, padding=self._padding, masks=masks)
