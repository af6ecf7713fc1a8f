"""What stands where the model's final norm stood."""

from __future__ import annotations

import copy
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from transformers.generation.candidate_generator import EarlyExitCandidateGenerator

from depthmix.method.backbone import Backbone
from depthmix.method.capture import HiddenStateCapture
from depthmix.method.mixture import Mixture, Routes, mix
from depthmix.method.placement import find_device

DRAFT_CODE = EarlyExitCandidateGenerator.get_candidates.__code__
"""What truncates the layer loop while transformers drafts."""


class MixtureNorm(nn.Module, ABC):
    """Stands where the model's final norm stood, and returns the mixture `Σ G_i N_i(h_i)`.

    Everything behind the final norm (head, loss, `generate`, cache) stays as it is. Subclasses
    say which mixtures there are and which one is active.

    Args:
        backbone: The model's parts; its final norm `N_p` is kept as `base_layer`.
    """

    base_layer: nn.Module
    _constants: set[str]

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self._constants = {name for name in vars(backbone.final_norm) if name[0] != "_"}
        self.base_layer = backbone.final_norm
        self.backbone = backbone
        self.capture = HiddenStateCapture()
        self.listener: Callable[[Routes], None] | None = None
        self.readout: int | None = None  # a late layer that predicts alone (`reading_out`)
        self.reader: int | None = None  # the thread that has chosen it
        self._draft_exit: int | None = None  # where transformers' own drafts stop
        self.objective: Any = None
        self.witness: Any = None  # sees other PEFT methods, where the mixture is attached

    @property
    @abstractmethod
    def active_mixture(self) -> Mixture | None:
        """The mixture that predicts now, or None for the base model."""

    def __getattr__(self, name: str) -> Any:
        """Give what the pretrained norm has and this module has not, as models and tools read it.

        That is what its class, its parameters and its construction gave it. What libraries hang
        onto one module later (accelerate's hooks, DeepSpeed's functions) stays that module's own.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            base_layer = self.__dict__.get("_modules", {}).get("base_layer")  # none in a raw copy
            if base_layer is None or name.startswith("__"):
                raise
            if hasattr(type(self), name):  # a property of ours has failed: let its own error out
                return object.__getattribute__(self, name)
            registered = (base_layer._parameters, base_layer._buffers, base_layer._modules)
            if (
                hasattr(type(base_layer), name)
                or name in self.__dict__.get("_constants", ())
                or any(name in own for own in registered)
            ):
                return getattr(base_layer, name)
            raise

    def __deepcopy__(self, memo: dict[int, Any]) -> MixtureNorm:
        """Follow the model into its copy; alone, it would see no hidden states there."""
        model = self.backbone.model
        parent = model.get_submodule(self.backbone.final_norm_name.rpartition(".")[0])
        if id(model) not in memo and id(parent) not in memo:
            raise TypeError(
                "The mixture in the final norm's place cannot be copied without its model, as "
                "`modules_to_save` with the final norm's name, or a PEFT method that targets it, "
                "would do: to train norms and router, use `MoDEConfig` (`train_final_norm=True` "
                "for the final layer's norm, too), or `modules_to_save=['mixture']` over a "
                "model from `depthmix.load`."
            )
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        return twin

    def watch(self, mixtures: Iterable[Mixture]) -> None:
        """Capture the hidden states that these mixtures read, and no others from now on."""
        depths, exits = set(), set()
        for mixture in mixtures:  # the last layer's input tells that it ran
            depths |= {*mixture.depths, self.backbone.num_hidden_layers - 1}
            exits |= {*mixture.exit_layers}
        self.unwatch()
        layers, begin = self.backbone.layers, self._check_drafts
        self.capture.watch(layers, depths, trained=exits, within=self.backbone.trunk, begin=begin)

    def unwatch(self) -> None:
        """Capture nothing from now on."""
        self.capture.remove(self.backbone.layers, within=self.backbone.trunk)

    @property
    def forward(self) -> Callable[..., Tensor]:
        """The forward pass, as a property.

        Liger-Kernel patches whatever stands at the final norm's place by writing `forward` into
        its `__dict__`. A property wins over that; a plain method would be bypassed in silence.
        """
        return self.__dict__.get("_replaced_forward", self._mix)

    @forward.setter
    def forward(self, function: Callable[..., Tensor]) -> None:
        """Let accelerate wrap the forward pass, which it does by assignment, and put it back."""
        if function == self._mix:
            self.__dict__.pop("_replaced_forward", None)
        else:
            self.__dict__["_replaced_forward"] = function

    @forward.deleter
    def forward(self) -> None:
        self.__dict__.pop("_replaced_forward", None)

    def _mix(
        self, hidden_states: Float[Tensor, "batch seq hidden"]
    ) -> Float[Tensor, "batch seq hidden"]:
        captured = self.capture.take()
        mixture = self.active_mixture
        if mixture is None:
            return self.base_layer(hidden_states)
        self._check_layers()
        # Layers may sit on several devices; the mixture lives on one.
        device = find_device(mixture.router)
        hidden_states = hidden_states.to(device)
        read = {*mixture.depths, *(mixture.exit_layers if self.training else ())}
        needed = {*read, self.backbone.num_hidden_layers - 1}
        if not needed <= captured.keys():
            return self._exit_early(mixture, hidden_states, needed, seen=needed & captured.keys())
        states = {depth: captured[depth].to(device) for depth in read}
        states[mixture.late_layers[-1]] = hidden_states
        if self.readout is not None:
            return self.answer_alone(self.readout, states[self.readout])
        routes = mixture(states, self.base_layer)
        if self.listener is not None:
            self.listener(routes)
        final_is_pretrained = str(mixture.late_layers[-1]) not in mixture.norms
        dtype = routes.states[-1].dtype if final_is_pretrained else self._dtype(hidden_states)
        return mix(routes.states, routes.weights).to(dtype)

    def _check_layers(self) -> None:
        """Refuse layers that are not those which the mixture reads."""
        if "_is_replica" in self.__dict__:
            raise RuntimeError(
                "`DataParallel` cannot run a mixture, whose replicas would share one model's "
                "state; use `DistributedDataParallel`, or show this process one device "
                "(`CUDA_VISIBLE_DEVICES`)."
            )
        if torch.compiler.is_compiling():
            return
        layers, num_layers = self.backbone.layers, self.backbone.num_hidden_layers
        if len(layers) != num_layers or not self.capture.still_watches(layers):
            raise RuntimeError(
                f"`{self.backbone.layers_name}` must hold the {num_layers} layers that it held "
                "when the model got its mixture, in their order, and some were replaced, copied, "
                f"moved, added or taken away ({len(layers)} now); change layers before `attach` or "
                "`get_peft_model`."
            )

    def _exit_early(
        self,
        mixture: Mixture,
        hidden_states: Float[Tensor, "batch seq hidden"],
        needed: set[int],
        *,
        seen: set[int],
    ) -> Float[Tensor, "batch seq hidden"]:
        """Answer for a pass that stopped early with the norm of the layer it stopped at.

        `generate(assistant_early_exit=…)` drafts by truncating the layer loop, through the
        configuration. The depths seen must be those below, or some got lost in another way.
        """
        stop = self._num_running_layers()
        if self.training or seen != {d for d in needed if d < stop}:
            raise RuntimeError(
                f"Only {len(seen)} of {len(needed)} hidden states of the mixture were seen; all "
                "layers must run before the final norm, in one process and thread and without "
                "another pass in between (for one layer's prediction see "
                "`depthmix.adapters.readout.reading_out`; `base_layer` is the pretrained norm)."
            )
        self._check_drafts()
        if stop in mixture.late_layers:
            return self.answer_alone(stop, hidden_states)
        return self.base_layer(hidden_states)

    def _num_running_layers(self) -> int:
        """Read where the layer loop stops."""
        config = getattr(self.backbone.decoder, "config", self.backbone.model.config)
        return config.get_text_config().num_hidden_layers

    def _check_drafts(self) -> None:
        """Refuse a pass whose layer loop is truncated because another call drafts, or did.

        `assistant_early_exit` changes the configuration while it drafts, for all who use the model,
        and leaves it so if it is interrupted.
        """
        if torch.compiler.is_compiling():
            return
        stop = self._num_running_layers()
        if stop >= self.backbone.num_hidden_layers:
            self._draft_exit = None
        elif _is_drafting():
            self._draft_exit = stop
        elif self._draft_exit == stop:
            raise RuntimeError(
                f"`config.num_hidden_layers` must be {self.backbone.num_hidden_layers} and is "
                f"{stop}: a `generate(assistant_early_exit={stop})` was interrupted and has left "
                "it so, or one runs in another thread; wait for that one, or set it back."
            )

    def answer_alone(
        self, layer: int, hidden_states: Float[Tensor, "batch seq hidden"]
    ) -> Float[Tensor, "batch seq hidden"]:
        """Let one late layer of the active mixture predict, `N_i(h_i)`.

        Args:
            layer: Its number.
            hidden_states: Its output.

        Returns:
            What the head takes, in the dtype that the base norm would return.
        """
        mixture = self.active_mixture
        assert mixture is not None  # callers have one
        normed = mixture.norm(layer, hidden_states, self.base_layer)
        return normed.to(self._dtype(hidden_states))

    def _dtype(self, hidden_states: Tensor) -> torch.dtype:
        """Dtype that the base norm would return, found on no tokens at all."""
        return self.base_layer(hidden_states[:, :0]).dtype


def _is_drafting() -> bool:
    """Tell whether transformers' own `assistant_early_exit` drafts further up in this thread."""
    frame = sys._getframe()
    while frame is not None and frame.f_code is not DRAFT_CODE:
        frame = frame.f_back
    return frame is not None


def find_mixture_norm(model: nn.Module) -> MixtureNorm | None:
    """Find the mixture in a model, wrapped or not, or None."""
    return next((m for m in model.modules() if isinstance(m, MixtureNorm)), None)


def active_mixture(model: nn.Module) -> Mixture | None:
    """Find the mixture that predicts now in a model, wrapped or not, or None."""
    norm = find_mixture_norm(model)
    return norm.active_mixture if norm is not None else None


def set_top_k(model: nn.Module, top_k: int | None) -> None:
    """Set how many routes each token keeps, whatever number the mixture was trained with.

    What is saved keeps the number it was trained with.

    Args:
        model: A model with a mixture, wrapped or not.
        top_k: Routes kept per token; `None` keeps all.

    Raises:
        ValueError: If there is no active mixture, or it has fewer routes.
    """
    if (mixture := active_mixture(model)) is None:
        raise ValueError(
            f"`top_k` needs an active mixture of depths, and {explain_no_mixture(model)}; leave it "
            "out, or load a model that was trained with one."
        )
    replace(mixture.config, top_k=top_k)  # checks it
    mixture.top_k = top_k


def explain_no_mixture(model: nn.Module) -> str:
    """Say why a model has no active mixture, for the middle of a sentence."""
    if not isinstance(model, PeftModel):
        return "the model has none"
    kinds = {
        str(getattr(one.peft_type, "value", one.peft_type)) for one in model.peft_config.values()
    }
    if "MODE_LORA" in kinds:
        return "the adapter that has one is not active"
    return f"the model's adapter ({', '.join(sorted(kinds))}) brings none"
