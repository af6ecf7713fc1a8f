"""The objective's place in training: where its other terms join the model's own loss."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from depthmix.loss.measurements import Step
from depthmix.loss.ways import AddedTerm, ReplacedLoss, TrainersLoss, Way
from depthmix.method.capture import PassState
from depthmix.method.config import MixtureConfig
from depthmix.method.mixture import Routes
from depthmix.method.norm import MixtureNorm

NO_POSITION = slice(0, 0)
"""Keeps no logits at all. The number 0 would keep all of them; 1 costs a CPU a copy of the head for
each sequence, since the product with a strided slice is taken row by row."""


class Objective:
    """Makes `L_task + λ L_distill` the loss of the model's own forward pass, and `+ α L_exits`.

    Forward hooks on the language model see labels, output and routes on every path: `Trainer`, a
    plain loop, PEFT with or without a task type. They act in training mode only, so an evaluation
    loss is the cross-entropy of the ensemble, whatever the task loss is on.

    A pass chooses between three ways when it begins. Where the model's own loss would be the
    cross-entropy of the labels, the whole of it is replaced (`ReplacedLoss`), on label positions
    alone: no logits are built, and the output has none. `mixture_loss=True` in the model's call
    asks for that, `mixture_loss=False` or `logits_to_keep` for the second way: the model's own loss
    and logits, with the other terms on top (`AddedTerm`). That is also what models with a
    loss of their own get; a trainer with the mixin collects these terms and adds them itself.
    Without labels, or where TRL's fused head is asked for log-probabilities, the trainer makes the
    loss (`TrainersLoss`), and they are left out, with a warning.

    All but the first have the ensemble's loss and no other: a training pass that goes them is
    refused where the mixture's `task_loss` names layers. One pass may run within another, before
    or after the other's layers, and each has its own loss.

    Args:
        norm: The mixture, in its place.
    """

    def __init__(self, norm: MixtureNorm) -> None:
        self.norm = norm
        self._passes = PassState()
        self._collected: dict[int, list[Step | None]] = {}  # by thread
        norm.listener = self._keep
        model = norm.backbone.model
        self._config = model.config.get_text_config()
        self._returns_dict = getattr(model.config, "return_dict", True)
        parameters = signature(type(model).forward).parameters.values()
        self._parameters = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
        self._keeps_logits = "logits_to_keep" not in self._parameters
        self._handles = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave),
        ]

    @contextmanager
    def collecting(self) -> Iterator[list[Step | None]]:
        """Leave the other terms of this thread's training passes to the caller, who adds them.

        Yields:
            A list that holds, after the block, the measurements of each training pass in it; `None`
            for a pass without labels. A pass whose whole loss the mixture's objective computed has
            nothing missing.
        """
        thread, steps = threading.get_ident(), []
        self._collected[thread] = steps
        try:
            yield steps
        finally:
            del self._collected[thread]

    def remove(self) -> None:
        """Leave the model's loss alone from now on."""
        self.norm.listener = None
        for handle in self._handles:
            handle.remove()

    def _enter(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """Choose the way of the pass that begins, and take from the call what is ours."""
        outer = self._take_outer(model)
        asked = kwargs.get("mixture_loss")
        kwargs = {name: value for name, value in kwargs.items() if name != "mixture_loss"}
        named = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        nameless = len(args) > len(self._parameters)
        if nameless or not (self._may_replace_loss(named) if asked is None else asked):
            way = self._leave_loss(named)
        else:
            way = self._replace_loss(named)
            args, kwargs = (), {**named, "return_dict": True}
            if not self._keeps_logits:
                kwargs["logits_to_keep"] = NO_POSITION
        self._passes.here.update(way=way, outer=outer)
        return args, kwargs

    def _leave(self, _model: nn.Module, _args: tuple, output: Any) -> Any:
        """Let the pass that ends finish as it chose to, and the one around it go on."""
        ended = self._passes.take()
        self._passes.here.update(ended.get("outer", {}))
        way: Way | None = ended.get("way")
        return output if way is None else way.finish(output, ended.get("routes"))

    def _take_outer(self, model: nn.Module) -> dict[str, Any]:
        """Take the entries of the pass around this one, and forget those that were interrupted."""
        entries, left = self._passes.take(), []
        while entries:
            left.append(entries)
            entries = entries.get("outer")
        num_outer = _count_calls(model) - 1 if left else 0
        return left[-num_outer:][0] if num_outer > 0 else {}

    def _may_replace_loss(self, kwargs: dict[str, Any]) -> bool:
        """Tell whether this pass's loss would be the labels' cross-entropy, and logits unasked."""
        labelled = kwargs.get("labels") is not None or kwargs.get("shift_labels") is not None
        routers = kwargs.get("output_router_logits")
        if routers is None:
            routers = getattr(self._config, "output_router_logits", False)
        return (
            labelled
            and self._trains()
            and self.norm.active_mixture is not None
            and self.norm.backbone.model.loss_function is ForCausalLMLoss
            and not routers
            and not kwargs.get("fused_lm_head")
            and "logits_to_keep" not in kwargs
        )

    def _replace_loss(self, named: dict[str, Any]) -> ReplacedLoss:
        """Take the labels, and what counts them, from a pass whose whole loss is ours."""
        return_dict = named.get("return_dict")  # PEFT passes None on
        shift_labels, labels = named.pop("shift_labels", None), named.pop("labels", None)
        return ReplacedLoss(
            backbone=self.norm.backbone,
            labels=labels if shift_labels is None else shift_labels,
            shifted=shift_labels is not None,
            num_items_in_batch=named.pop("num_items_in_batch", None),
            num_sequences_in_batch=named.pop("num_sequences_in_batch", None),
            as_tuple=not (self._returns_dict if return_dict is None else return_dict),
            steps=self._steps(),
        )

    def _leave_loss(self, named: dict[str, Any]) -> AddedTerm | TrainersLoss | None:
        """Choose the way of a pass that keeps its loss; none where it does not train."""
        if not self._trains():
            return None
        shift_labels, steps = named.get("shift_labels"), self._steps()
        labels = named.get("labels") if shift_labels is None else shift_labels
        rest: dict[str, Any] = {
            "backbone": self.norm.backbone,
            "shifted": shift_labels is not None,
            "num_items_in_batch": named.get("num_items_in_batch"),
            "steps": steps,
        }
        if labels is None or (named.get("fused_lm_head") and steps is None):
            return TrainersLoss(labels=labels, **rest)
        return AddedTerm(labels=labels, **rest)

    def _trains(self) -> bool:
        return self.norm.training and torch.is_grad_enabled()

    def _steps(self) -> list[Step | None] | None:
        """Find the list in which this thread collects."""
        if torch.compiler.is_compiling():  # what is traced knows no threads
            return next(iter(self._collected.values()), None)
        return self._collected.get(threading.get_ident())

    def _keep(self, routes: Routes) -> None:
        """Keep what the mixture made of the pass, for its end."""
        if not self._trains():
            return
        if self.norm.witness is not None:
            self.norm.witness.check_training()
        self._passes.here["routes"] = routes
        if self._steps() is None:
            warn_of_rates(routes.mixture.config)
        narrow = any(p.requires_grad and p.dtype.itemsize < 4 for p in routes.mixture.parameters())
        # Sharded parameters may be narrow in a pass alone.
        if narrow and not torch.distributed.is_initialized():
            warnings.warn(
                "The mixture's parameters are narrower than float32, and small updates of them "
                "are lost to rounding; call `.float()` on it after the trainer is made (TRL "
                "narrows adapters over a quantised model), or put `MoDETrainerMixin` before "
                "the trainer (`MoDESFTTrainer` has it).",
                stacklevel=2,
            )


def _count_calls(module: nn.Module) -> int:
    """Count the calls of a module that are under way in this thread; none while it is traced."""
    if torch.compiler.is_compiling():
        return 0
    frame, num_calls = sys._getframe(), 0
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals["self"] is module:
            num_calls += 1
        frame = frame.f_back
    return num_calls


def warn_of_rates(config: MixtureConfig) -> None:
    """Say that nobody looks at the learning rates of single parts, without the mixin."""
    for name in ("exit_learning_rate_factor", "router_learning_rate_factor"):
        if getattr(config, name) != 1:
            warnings.warn(
                f"`{name}` acts in trainers with `MoDETrainerMixin` alone; use one, or leave it "
                "out and give the optimizer a group of parameters with a rate of its own.",
                stacklevel=2,
            )
