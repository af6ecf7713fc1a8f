"""Generation in which layers put off work: what its ways have in common."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    StoppingCriteriaList,
    StopStringCriteria,
)

from depthmix.decoding.calls import read_call, sees_alike
from depthmix.decoding.requirements import check_deferrable, check_device
from depthmix.decoding.stand_ins import Claim, Turn
from depthmix.method.norm import active_mixture, find_mixture_norm
from depthmix.method.parts import find_parts


class Deferral(ABC):
    """Generation by transformers' own loop, while layers put off work.

    Subclasses stand in front of the layers, and give each step the dense model's logits.

    Args:
        model: A decoder, with a mixture or without one.

    Raises:
        TypeError: If the model is not a decoder-only language model with a head.
        ValueError: If its layers, final norm or head cannot be found.
    """

    name: str
    """What errors call this way of generating."""

    door: str
    """What errors say to leave out, so that generation is the model's own."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.norm: Any = find_mixture_norm(model)  # None without a mixture
        self.mixture: Any = active_mixture(model)
        self.backbone, _ = find_parts(model)
        self._final_norm = self.backbone.final_norm
        self._cache: Any = None
        self._turn: Turn | None = None
        self._modules: list[nn.Module] = []
        self._is_padded: bool | None = None
        self._padding: Int[Tensor, "batch columns"] | None = None

    def generate(self, *args: Any, streamer: Any = None, **kwargs: Any) -> Any:
        """Generate as the model's own `generate` does, with the same arguments and result.

        Meanwhile anybody may call the model as ever, in this thread or another, and gets its
        ordinary answers. If it is interrupted, by an exception or Ctrl-C, the model is as before; a
        cache that was passed is of no use.

        Raises:
            RuntimeError: If another mixture, or none, is active by now, if another call defers
                layers of this model, or if the model's parts are changed meanwhile.
            ValueError: If the way of decoding, the cache or the attention cannot be deferred.
        """
        if kwargs.get("assistant_model") is not None:  # transformers would keep it from us
            raise ValueError(
                f"`assistant_model` cannot be combined with {self.name.lower()}; leave it out, or "
                "call the model's own `generate`."
            )
        # Transformers keeps a streamer from what stands for its loop.
        loop = partial(self, streamer=streamer)
        return self.model.generate(*args, custom_generate=loop, **read_stop_strings(kwargs))

    def __call__(
        self,
        model: Any,
        input_ids: Int[Tensor, "batch seq"],
        generation_config: GenerationConfig,
        streamer: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Decode in the place of transformers' own loop, which calls this.

        Raises:
            RuntimeError: If another mixture, or none, is active by now, if another call defers
                layers of this model, or if the model's parts are changed meanwhile.
            ValueError: If `model` is not the one that this was made for, or the way of decoding,
                the cache or the attention cannot be deferred.
        """
        own: Any = self.backbone.model
        if model is not own:
            raise ValueError(
                f"`custom_generate` must be a {type(self).__name__} of the model that generates, "
                f"got one that was made for another; make it by `{type(self).__name__}(model)`."
            )
        self._check_mixture()
        cache = kwargs.get("past_key_values")
        outlives = generation_config.return_dict_in_generate or hasattr(cache, "_is_user_defined")
        check_deferrable(model, generation_config, cache, name=self.name, door=self.door)
        check_device(input_ids.device, outlives=outlives, name=self.name)
        turn = Turn(self.name)
        try:
            try:
                turn.take([(model, "forward", self._run_pass), *self._claim()])
                self._turn, self._cache = turn, cache
                self._modules = list(self.backbone.layers)
                streamer = self._begin(input_ids, generation_config, streamer)
                if streamer is not None:
                    streamer.put(input_ids.cpu())  # streamers expect the prompt first
                output = model._sample(
                    input_ids,
                    generation_config=generation_config,
                    streamer=streamer,
                    **kwargs,
                )
                if outlives:
                    self._complete_cache()
            finally:
                self._leave(turn)
        finally:
            self._leave(turn)  # whatever the first one was interrupted at
        return output

    def _leave(self, turn: Turn) -> None:
        """Put the model back, and forget this call; twice does no harm."""
        turn.end()
        if self._turn is turn:
            self._forget()
            self._turn = self._cache = self._padding = self._is_padded = None
            self._modules = []

    def _run_pass(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a pass of the decoding loop, or let somebody else's pass be an ordinary one."""
        turn = self._turn
        assert turn is not None  # or nothing of ours stood there
        if turn.in_pass or kwargs.get("past_key_values") is not self._cache:
            with turn.passing(ours=False):
                return forward(*args, **kwargs)
        turn.check()
        self._check_mixture()
        layers = list(self.backbone.layers)
        if layers != self._modules or self.backbone.final_norm is not self._final_norm:
            raise RuntimeError(
                f"{self.name} cannot go on, because the model's layers or its final norm were "
                "replaced while it generates; change the model before or after."
            )
        self._read_padding(kwargs.get("attention_mask"), kwargs.get("input_ids"))
        with turn.passing(ours=True):
            return self._step(forward, *args, **kwargs)

    def _read_padding(self, mask: Tensor | None, input_ids: Tensor | None) -> None:
        """Note a pass's padding, from which masks are made; none where each token counts."""
        if self._is_padded is None or input_ids is None or input_ids.shape[1] > 1:
            self._is_padded = mask is not None and not bool(mask.all())
        self._padding = mask if self._is_padded else None

    def _read_call(
        self, layer: nn.Module, names: list[str], args: tuple, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Name what a layer was called with, beside its hidden states (`calls.read_call`)."""
        return read_call(
            layer, names, args, kwargs, cache=self._cache, name=self.name, door=self.door
        )

    def _check_mask(
        self,
        layer: nn.Module,
        index: int,
        hidden_states: Float[Tensor, "batch new hidden"],
        call: dict[str, Any],
    ) -> None:
        """Refuse a layer that looks at other positions than ours will be made for."""
        cache, padding, given = self._cache, self._padding, call.get("attention_mask")
        is_prompt = hidden_states.shape[1] > 1 or cache.get_seq_length(index) == 0
        if given is None and not is_prompt:
            return
        if not sees_alike(given, hidden_states, cache=cache, index=index, padding=padding):
            raise ValueError(
                f"{self.name} needs layers that attend to all before them or to a sliding window, "
                f"and {type(layer).__name__} is given a mask of another kind; leave out "
                f"{self.door} for this model."
            )

    def _check_mixture(self) -> None:
        """Refuse to go on with another mixture than this was made for."""
        norm = self.norm
        if norm is None:  # one that is put on later stands in the final norm's place
            changed = self.backbone.final_norm is not self._final_norm
        else:
            changed = norm.active_mixture is not self.mixture or norm.readout is not None
        if changed:
            raise RuntimeError(
                f"{type(self).__name__} needs the mixture that was active when it was made to "
                "predict, or none if none was, and now another one, the base model or a late "
                "layer alone does; "
                f"activate its adapter, or make a new {type(self).__name__}."
            )

    @abstractmethod
    def _claim(self) -> Sequence[Claim]:
        """Name the functions to stand in front of, the model's own forward pass apart."""

    @abstractmethod
    def _begin(
        self, input_ids: Int[Tensor, "batch seq"], config: GenerationConfig, streamer: Any
    ) -> Any:
        """Make ready for one call, once the model is claimed.

        Returns:
            Who gets the tokens: the caller's streamer, somebody before it, or nobody.
        """

    @abstractmethod
    def _step(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Answer the decoding loop, which asks for the logits after its newest tokens."""

    @abstractmethod
    def _complete_cache(self) -> None:
        """Bring the cache to where the dense model would have it."""

    @abstractmethod
    def _forget(self) -> None:
        """Let go of one call's tensors, and leave its cache as caches are."""


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
