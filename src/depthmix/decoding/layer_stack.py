"""The layers in one call of fast generation: a pass stops at a draft, and later ones catch up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from depthmix.decoding.drafting import Draft, Drafter
from depthmix.decoding.few_rows import multiply_few
from depthmix.decoding.layer_queue import LayerQueue, queue_layers
from depthmix.decoding.pace import Pace
from depthmix.method.backbone import Backbone


class LayerStack:
    """A model's layers, norm and head, of which those above a draft wait.

    A pass asks the exits on its way up. Behind a draft no layer runs; each keeps what it has yet to
    process, and does so in the first pass that comes to it.

    Args:
        backbone: The model's parts.
        drafter: What its exits draft.
        norm: The module in the final norm's place where the model has a mixture, else `None`.
        depths: Layers whose states the mixture looks at.
        verify: Whether the top looks at all that was pending, or at the newest position alone.
    """

    def __init__(
        self,
        backbone: Backbone,
        drafter: Drafter,
        *,
        norm: Any,
        depths: Sequence[int],
        verify: bool,
    ) -> None:
        self.verify, self.num_runs = verify, 0
        self._backbone, self._drafter = backbone, drafter
        self._norm, self._depths = norm, tuple(depths)
        self.end()

    def begin(self, modules: Sequence[nn.Module], cache: DynamicCache, pace: Pace) -> None:
        """Take the layers as the model has them now, for one call.

        Args:
            modules: All layers, lowest first.
            cache: The decoding loop's keys and values.
            pace: What counts the work.
        """
        self.layers = queue_layers(modules)
        self._cache, self._pace = cache, pace

    def end(self) -> None:
        """Let go of one call's tensors."""
        self.layers: list[LayerQueue] = []
        self._cache: Any = None
        self._pace: Any = None
        self._kept: dict[int, list[Float[Tensor, "batch seq hidden"]]] = {}
        self._seen: Int[Tensor, "batch columns"] | None = None
        self.in_prompt = self._asks_exit = False
        self.begin_pass(None)

    def begin_round(self, seen: Int[Tensor, "batch columns"] | None) -> None:
        """Make ready for passes until the top has run.

        Args:
            seen: 0 where a row has no token, for all positions of the round; `None` where each one
                has.
        """
        self._seen = seen
        self._kept = {depth: [] for depth in self._depths} if self.verify else {}

    def begin_pass(self, active: Bool[Tensor, " batch"] | None) -> None:
        """Make ready for one pass.

        Args:
            active: Rows for which a draft is of use; `None` asks no exit.
        """
        self._active = active
        self._masks: dict[Any, Any] = {}
        self.draft: Draft | None = None
        """What the pass has drafted."""
        self._normed: Float[Tensor, "batch pending hidden"] | None = None

    @contextmanager
    def reading_prompt(self) -> Iterator[None]:
        """Let all layers run, as in the model itself."""
        self.in_prompt = True
        try:
            yield
        finally:
            self.in_prompt = False

    def read(
        self, layer: LayerQueue, hidden_states: Float[Tensor, "batch seq hidden"], call: Any
    ) -> Any:
        """Run a layer at a part of the prompt.

        Args:
            layer: One of `layers`.
            hidden_states: What it is given.
            call: What else, by name.

        Returns:
            What the layer gives.
        """
        output = layer.forward(hidden_states, **call)
        self.num_runs += 1
        layer.gives_tuple = isinstance(output, tuple)
        return output

    def run(
        self, layer: LayerQueue, hidden_states: Float[Tensor, "batch seq hidden"], call: Any
    ) -> Any:
        """Run a layer at the positions that it has missed, or put it off.

        Args:
            layer: One of `layers`.
            hidden_states: What it is given for the newest position.
            call: What else, by name.

        Returns:
            What the next layer is given; nobody looks at it after a draft.
        """
        if layer.index == 0:
            layer.inputs.append(hidden_states)
            if 0 in self._kept:
                self._kept[0].append(hidden_states)
        layer.calls.append(call)
        if self.draft is None:
            states = self._run(layer)
            hidden_states = states[:, -hidden_states.shape[1] :]
            if self._active is not None and layer.index + 1 in self._drafter.plan.exits:
                self._ask(layer.index + 1, hidden_states[:, -1], self._active)
            if self.verify and layer.above is None:  # the top looks at all that was pending
                hidden_states = states
        return self.layers[0].wrap(hidden_states)  # the lowest always runs

    def run_missed(self) -> Any:
        """Let each layer process what it has missed; give what the highest of them puts out."""
        states = None
        for layer in self.layers:
            if layer.calls:
                states = self._run(layer)
        return states

    def catch_up(self) -> Float[Tensor, "batch pending vocab"]:
        """Take what is pending to the top without another token, and give the logits there."""
        self.begin_pass(None)
        states = self._backbone.final_norm(self.run_missed())
        return self._unembed(states if self._normed is None else self._normed)

    def read_top(
        self, logits: Float[Tensor, "batch last _"]
    ) -> Float[Tensor, "batch pending vocab"]:
        """Give the model's logits at all that was pending, after a pass that came to the top.

        Args:
            logits: What the model gave, which are those if one position was pending.
        """
        return logits if self._normed is None else self._unembed(self._normed)

    def run_norm(
        self, forward: Callable[..., Any], hidden_states: Float[Tensor, "batch seq hidden"]
    ) -> Float[Tensor, "batch last hidden"]:
        """Norm what came to the top; after a draft there is nothing to norm.

        Where several positions were pending, all are kept, and the model goes on with the last one,
        as some models give what the norm returns the shape of their input.

        Args:
            forward: The norm itself.
            hidden_states: What the final layer has put out.

        Returns:
            The last position, normed; the whole prompt where it is one.
        """
        if self.draft is not None:
            return hidden_states
        if self._kept and self._norm is not None and not self.in_prompt:
            last = self._backbone.num_hidden_layers - 1
            kept = {depth: torch.cat(states, dim=1) for depth, states in self._kept.items()}
            self._norm.capture.replace({last: hidden_states, **kept})
        normed = forward(hidden_states)
        if self.in_prompt or normed.shape[1] == 1:
            return normed
        self._normed = normed
        return normed[:, -1:]

    def run_head(
        self,
        forward: Callable[..., Any],
        states: Float[Tensor, "*batch hidden"],
        *args: Any,
        **kwargs: Any,
    ) -> Float[Tensor, "*batch vocab"]:
        """Predict what came to the top; nobody looks at other logits.

        Args:
            forward: The head itself.
            states: What it is given.
            args: What else.
            kwargs: What else, by name.

        Returns:
            Logits, or zeros of another width where nobody looks.
        """
        is_idle = self.draft is not None or self._normed is not None
        if is_idle and not self._asks_exit:
            return states.new_zeros(*states.shape[:-1], 1)
        logits = multiply_few(self._backbone.head, states, forward)
        return forward(states, *args, **kwargs) if logits is None else logits

    def _run(self, layer: LayerQueue) -> Float[Tensor, "batch missed hidden"]:
        """Process all positions that a layer has missed."""
        states = layer.run(cache=self._cache, padding=self._seen, masks=self._masks)
        self.num_runs += 1
        self._pace.run(states.shape[1], batch_size=len(states))
        if layer.index + 1 in self._kept:
            self._kept[layer.index + 1].append(states)
        return states

    def _unembed(
        self, normed: Float[Tensor, "batch pending hidden"]
    ) -> Float[Tensor, "batch pending vocab"]:
        """Predict at all that was pending."""
        self._normed, backbone = None, self._backbone
        normed = normed.to(backbone.head_weight.device, backbone.head_dtype(normed.dtype))
        return backbone.unembed(normed)

    def _ask(
        self,
        depth: int,
        hidden_states: Float[Tensor, "batch hidden"],
        active: Bool[Tensor, " batch"],
    ) -> None:
        """Ask an exit for a draft."""
        self._pace.check()
        self._asks_exit = True
        try:
            self.draft = self._drafter.draft(depth, hidden_states, active)
        finally:
            self._asks_exit = False
