"""The objective's place in training: where `λ L_distill` joins the model's own loss."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from depthmix.loss.batch import mixture_loss
from depthmix.loss.measurements import Step, measure
from depthmix.method.capture import PassState
from depthmix.method.mixture import Routes
from depthmix.method.norm import MixtureNorm

NO_POSITION = slice(0, 0)
"""Keeps no logits at all. The number 0 would keep all of them; 1 costs a CPU a copy of the head for
each sequence, since the product with a strided slice is taken row by row."""


@dataclass(frozen=True)
class Request:
    """Labels of a pass whose loss the objective computes instead of the model."""

    labels: Tensor | None
    """Token ids, `IGNORE_INDEX` where a token does not count; None for a pass without labels."""

    num_items_in_batch: Tensor | int | None
    """Label tokens of the whole accumulated batch."""

    num_sequences_in_batch: int | None
    """Sequences of the whole accumulated batch."""

    shifted: bool
    """Whether the labels are already shifted by one."""

    as_tuple: bool
    """Whether the caller wants a tuple."""


class Objective:
    """Makes `L_task + λ L_distill` the loss of the model's own forward pass.

    Forward hooks on the language model see labels, output and routes on every path: `Trainer`, a
    plain loop, PEFT with or without a task type. They act in training mode only, so an evaluation
    loss is the cross-entropy of the ensemble, whatever the task loss is on.

    There are two ways. Where the model's own loss would be the cross-entropy of the labels, the
    whole loss is left to `mixture_loss`, on label positions alone: no logits are built, and the
    output has none. `mixture_loss=True` in the model's call asks for that, `mixture_loss=False` or
    `logits_to_keep` for the other way: the model's own loss and logits, with the distillation term
    on top. That is also what models with a loss of their own get. Where TRL's fused head is asked
    for log-probabilities the trainer makes the loss from them, and the term is left out, with a
    warning. A trainer with the mixin collects the terms of the second way and adds them itself.

    The other way has the ensemble's loss and no other: a training pass that goes it, or has no
    labels, is refused where the mixture's `task_loss` names layers.

    Args:
        norm: The mixture, in its place.
    """

    def __init__(self, norm: MixtureNorm) -> None:
        self.norm = norm
        self._routes = PassState()
        self._requests = PassState()
        self._steps = PassState()
        self._collects = False
        norm.listener = self._keep
        model = norm.backbone.model
        self._config = model.config.get_text_config()
        self._returns_dict = getattr(model.config, "return_dict", True)
        parameters = signature(type(model).forward).parameters.values()
        self._parameters = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
        self._keeps_logits = "logits_to_keep" not in self._parameters
        self._handles = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._join, with_kwargs=True),
        ]

    @contextmanager
    def collecting(self) -> Iterator[list[Step | None]]:
        """Leave the distillation term of training passes to the caller, who adds it.

        Yields:
            A list that holds, after the block, the measurements of each training pass in it; `None`
            for a pass without labels. A pass whose whole loss the mixture's objective computed has
            nothing missing.
        """
        steps: list[Step | None] = []
        self._steps.take()
        self._collects = True
        try:
            yield steps
        finally:
            self._collects = False
            steps += self._steps.take().get("steps", [])

    def remove(self) -> None:
        """Leave the model's loss alone from now on."""
        self.norm.listener = None
        for handle in self._handles:
            handle.remove()

    def _enter(self, _model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """Take the labels of a pass whose loss is the mixture's, and spare it the logits."""
        self._requests.take()  # a pass that was interrupted has left its own, and its graph
        self._routes.take()
        asked = kwargs.get("mixture_loss")
        given = {name: value for name, value in kwargs.items() if name != "mixture_loss"}
        named = {**dict(zip(self._parameters, args, strict=False)), **given}
        nameless = len(args) > len(self._parameters)
        if nameless or not (self._may_replace_loss(named) if asked is None else asked):
            return args, given
        kwargs = named
        shift_labels, labels = kwargs.pop("shift_labels", None), kwargs.pop("labels", None)
        shifted = shift_labels is not None
        return_dict = kwargs.get("return_dict")  # PEFT passes None on
        self._requests.here["request"] = Request(
            labels=shift_labels if shifted else labels,
            num_items_in_batch=kwargs.pop("num_items_in_batch", None),
            num_sequences_in_batch=kwargs.pop("num_sequences_in_batch", None),
            shifted=shifted,
            as_tuple=not (self._returns_dict if return_dict is None else return_dict),
        )
        kwargs["return_dict"] = True
        return (), kwargs if self._keeps_logits else {**kwargs, "logits_to_keep": NO_POSITION}

    def _may_replace_loss(self, kwargs: dict[str, Any]) -> bool:
        """Tell whether this pass's loss would be the labels' cross-entropy, and logits unasked."""
        labelled = kwargs.get("labels") is not None or kwargs.get("shift_labels") is not None
        routers = kwargs.get("output_router_logits")
        if routers is None:
            routers = getattr(self._config, "output_router_logits", False)
        return (
            labelled
            and self.norm.training
            and torch.is_grad_enabled()
            and self.norm.active_mixture is not None
            and self.norm.backbone.model.loss_function is ForCausalLMLoss
            and not routers
            and not kwargs.get("fused_lm_head")
            and "logits_to_keep" not in kwargs
        )

    def _keep(self, routes: Routes) -> None:
        if self.norm.training and torch.is_grad_enabled():
            if self.norm.witness is not None:
                self.norm.witness.check_training()
            self._routes.here["routes"] = routes
            narrow = any(
                p.requires_grad and p.dtype.itemsize < 4 for p in routes.mixture.parameters()
            )
            # Sharded parameters may be narrow in a pass alone.
            if narrow and not torch.distributed.is_initialized():
                warnings.warn(
                    "The mixture's parameters are narrower than float32, and small updates of them "
                    "are lost to rounding; call `.float()` on it after the trainer is made (TRL "
                    "narrows adapters over a quantised model), or put `MoDETrainerMixin` before "
                    "the trainer (`MoDESFTTrainer` has it).",
                    stacklevel=2,
                )

    def _join(self, _model: nn.Module, _args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Compute the objective of a pass with labels, and put it where the caller looks."""
        routes: Routes | None = self._routes.take().get("routes")
        request: Request | None = self._requests.take().get("request")
        asked = request is not None
        if asked and (routes is None or request.labels is None):
            raise RuntimeError(
                "`mixture_loss=True` needs `labels`, a mixture that is active, training mode and "
                "gradients; leave it out of any other pass."
            )
        if request is None:
            shifted = kwargs.get("shift_labels") is not None
            request = Request(
                labels=kwargs["shift_labels"] if shifted else kwargs.get("labels"),
                num_items_in_batch=kwargs.get("num_items_in_batch"),
                num_sequences_in_batch=None,
                shifted=shifted,
                as_tuple=isinstance(output, tuple),
            )
        if routes is None:
            return output
        config, fused = routes.mixture.config, bool(kwargs.get("fused_lm_head"))
        if not asked and config.task_loss != "ensemble":
            raise ValueError(
                "`task_loss` must be 'ensemble' where a training pass keeps its own loss or "
                f"logits, got {config.task_loss!r}; train with `labels` and plain "
                "cross-entropy, by `MoDESFTTrainer` instead of TRL's own, without label smoothing, "
                "a loss function or expert routers' loss."
            )
        if request.labels is None:
            if self._collects:
                self._keep_step(None)
            elif config.distils:
                warnings.warn(
                    "The distillation loss is left out of a training pass without `labels`, as "
                    "with `label_smoothing_factor`, `compute_loss_func` or a trainer that keeps "
                    "them for its own loss; give them to the model, or set "
                    "`distillation_weight=0`.",
                    stacklevel=2,
                )
            return output
        if fused and not self._collects:
            if config.distils:
                warnings.warn(
                    "This trainer leaves the distillation loss out, because it makes its own loss "
                    "from log-probabilities; put `MoDETrainerMixin` before it, as in `class "
                    "MyTrainer(MoDETrainerMixin, DPOTrainer)` (`MoDESFTTrainer` is that for "
                    "`SFTTrainer`), or set `distillation_weight=0`.",
                    stacklevel=2,
                )
            return output
        loss = mixture_loss(
            routes,
            self.norm.backbone,
            request.labels,
            num_items_in_batch=request.num_items_in_batch,
            num_sequences_in_batch=request.num_sequences_in_batch,
            shifted=request.shifted,
        )
        term = loss.total - loss.task
        if self._collects:
            self._keep_step(
                measure(
                    routes,
                    loss,
                    missing=None if asked else term,
                    is_share=request.num_items_in_batch is not None,
                )
            )
        if asked:
            output = type(output)(**{**output, "loss": loss.total, "logits": None})
            return output.to_tuple() if request.as_tuple else output
        if self._collects:
            return output
        if request.as_tuple:
            return (output[0] + term, *output[1:])
        output["loss"] = output["loss"] + term
        return output

    def _keep_step(self, step: Step | None) -> None:
        here = self._steps.here
        here["steps"] = [*here.get("steps", ()), step]
