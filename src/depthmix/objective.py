"""The objective's place in training: where `λ L_distill` joins the model's own loss."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from depthmix.capture import PassState
from depthmix.losses import MixtureLoss, label_positions, mixture_loss
from depthmix.mixture import Routes
from depthmix.mixture_norm import MixtureNorm


@dataclass(frozen=True)
class Step:
    """What one training forward pass measured, over this pass's own label tokens."""

    missing: Float[Tensor, ""] | None
    """Weighted distillation term that the model's returned loss lacks, with its graph, or None."""

    num_tokens: int
    """Label tokens."""

    task_loss: Float[Tensor, ""]
    """Cross-entropy of the ensemble in nats, mean over label tokens."""

    distillation_loss: Float[Tensor, ""]
    """Divergence of the late layers in nats, reduced as the mixture says."""

    distillation_weight: float
    """λ."""

    weight_per_token: float
    """What one nat of divergence at a token weighs against one nat of its cross-entropy."""

    routing_weights: Float[Tensor, " routes"]
    """Routing weight of each route, mean over label tokens."""

    routing_entropy: Float[Tensor, ""]
    """Entropy of the routing weights in nats, mean over label tokens; at most ln k."""

    late_layers: tuple[int, ...]
    """Layers of the routes."""


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


class Objective:
    """Makes `L_task + λ L_distill` the loss of the model's own forward pass.

    Forward hooks on the language model see labels, output and routes on every path: `Trainer`, a
    plain loop, PEFT with or without a task type. They act in training mode only, so an evaluation
    loss is the cross-entropy of the ensemble.

    There are two ways. A pass with `mixture_loss=True` leaves the whole loss to `mixture_loss`, on
    label positions alone: the model builds no logits, and `MoDETrainerMixin` asks for that. Any
    other pass with labels keeps the model's own loss and gets the distillation term on top; only
    TRL's fused head hides its loss from the model, and there the mixin adds the term.

    Args:
        norm: The mixture, in its place.
    """

    def __init__(self, norm: MixtureNorm) -> None:
        self.norm = norm
        self._routes = PassState()
        self._requests = PassState()
        self._steps = PassState()
        norm.listener = self._keep
        model = norm.backbone.model
        self._keeps_logits = "logits_to_keep" not in signature(type(model).forward).parameters
        self._handles = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._join, with_kwargs=True),
        ]

    def take(self) -> Step | None:
        """Hand over the last training pass's measurements, once."""
        return self._steps.take().get("step")

    def remove(self) -> None:
        """Leave the model's loss alone from now on."""
        self.norm.listener = None
        for handle in self._handles:
            handle.remove()

    def _enter(self, _model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """Take the labels of a pass that asks for the mixture's loss, and spare it the logits."""
        self._requests.take()
        if "mixture_loss" not in kwargs:
            return None
        kwargs = dict(kwargs)
        if not kwargs.pop("mixture_loss"):
            return args, kwargs
        shift_labels, labels = kwargs.pop("shift_labels", None), kwargs.pop("labels", None)
        shifted = shift_labels is not None
        self._requests.here["request"] = Request(
            labels=shift_labels if shifted else labels,
            num_items_in_batch=kwargs.pop("num_items_in_batch", None),
            num_sequences_in_batch=kwargs.pop("num_sequences_in_batch", None),
            shifted=shifted,
        )
        kwargs["return_dict"] = True
        return args, kwargs if self._keeps_logits else {**kwargs, "logits_to_keep": 1}

    def _keep(self, routes: Routes) -> None:
        if self.norm.training and torch.is_grad_enabled():
            self._routes.here["routes"] = routes

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
            )
        if routes is None or request.labels is None:
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
        fused = bool(kwargs.get("fused_lm_head"))
        last: Step | None = self._steps.here.get("step")
        if fused and last is not None and last.missing is not None:
            warnings.warn(
                "This trainer leaves the distillation loss out, because it makes its own loss from "
                "log-probabilities; use `MoDESFTTrainer`, or put `MoDETrainerMixin` before it.",
                stacklevel=2,
            )
        self._steps.here["step"] = self._measure(routes, loss, request, term if fused else None)
        if fused:
            return output
        if asked:
            output["loss"] = loss.total
            return output
        if isinstance(output, tuple):
            return (output[0] + term, *output[1:])
        output["loss"] = output["loss"] + term
        return output

    @staticmethod
    @torch.no_grad()
    def _measure(
        routes: Routes, loss: MixtureLoss, request: Request, missing: Tensor | None
    ) -> Step:
        assert request.labels is not None
        labels = request.labels.to(routes.weights.device)
        mask, _ = label_positions(labels, shifted=request.shifted)
        weights = routes.weights.detach()[mask].to(loss.task.device)  # (N, k)
        whole_over_part = loss.num_items / max(loss.num_tokens, 1)
        return Step(
            missing=missing,
            num_tokens=loss.num_tokens,
            task_loss=loss.task.detach() * whole_over_part,
            distillation_loss=loss.distillation.detach() * whole_over_part,
            distillation_weight=routes.mixture.config.distillation_weight,
            weight_per_token=loss.weight_per_token,
            routing_weights=weights.sum(0) / max(loss.num_tokens, 1),
            routing_entropy=torch.special.entr(weights).sum() / max(loss.num_tokens, 1),
            late_layers=routes.mixture.late_layers,
        )
