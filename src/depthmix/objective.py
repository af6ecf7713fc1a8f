"""The objective's place in training: where `λ L_distill` joins the model's own loss."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from depthmix.capture import PassState
from depthmix.mixture import Routes
from depthmix.mixture_loss import MixtureLoss, mixture_loss
from depthmix.mixture_norm import MixtureNorm

NO_POSITION = slice(0, 0)
"""Keeps no logits at all. The number 0 would keep all of them; 1 costs a CPU a copy of the head for
each sequence, since the product with a strided slice is taken row by row."""

UNUSED_WEIGHT = 1e-5
"""Routing weight below which a token makes no use of a route (the paper's sparsity)."""


@dataclass(frozen=True)
class Step:
    """What one training forward pass measured, over this pass's own label tokens."""

    missing: Float[Tensor, ""] | None
    """Weighted distillation term that the model's returned loss lacks, with its graph, or None."""

    num_tokens: int
    """Label tokens."""

    task_loss: Float[Tensor, ""]
    """Cross-entropy of what the mixture's `task_loss` names, in nats, mean over label tokens."""

    distillation_loss: Float[Tensor, ""]
    """Divergence of the late layers in nats, reduced as the mixture says."""

    distillation_weight: float
    """λ."""

    weight_per_token: Float[Tensor, ""]
    """What one nat of divergence at a token weighs against one nat of its cross-entropy."""

    routing_weights: Float[Tensor, " routes"]
    """Routing weight of each route, mean over label tokens."""

    routing_variance: Float[Tensor, " routes"]
    """Variance of each route's weight over label tokens."""

    routing_sparsity: Float[Tensor, " routes"]
    """Share of the label tokens whose weight on the route is below `UNUSED_WEIGHT`."""

    routing_entropy: Float[Tensor, ""]
    """Entropy of the routing weights in nats, mean over label tokens; at most ln k."""

    layer_losses: Float[Tensor, " layers"]
    """Cross-entropy of each late layer's own prediction in nats, mean over label tokens; empty
    where it is not logged."""

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
    on top. That is also what models with a loss of their own get. Only TRL's fused head hides its
    loss from the model, and there the mixin adds the term.

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

    def take(self) -> Step | None:
        """Hand over the last training pass's measurements, once."""
        return self._steps.take().get("step")

    def remove(self) -> None:
        """Leave the model's loss alone from now on."""
        self.norm.listener = None
        for handle in self._handles:
            handle.remove()

    def _enter(self, _model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """Take the labels of a pass whose loss is the mixture's, and spare it the logits."""
        self._requests.take()
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
                    "narrows adapters over a quantised model), or use `MoDESFTTrainer`.",
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
        if not asked and routes.mixture.config.task_loss != "ensemble":
            raise ValueError(
                "`task_loss` must be 'ensemble' where a training pass keeps its own loss or "
                f"logits, got {routes.mixture.config.task_loss!r}; train with `labels` and plain "
                "cross-entropy, by `MoDESFTTrainer` instead of TRL's own, without label smoothing, "
                "a loss function or expert routers' loss."
            )
        if request.labels is None:
            if routes.mixture.config.distils:
                warnings.warn(
                    "The distillation loss is left out of a training pass without `labels`, as "
                    "with `label_smoothing_factor` or `compute_loss_func`; give them to the model, "
                    "or set `distillation_weight=0`.",
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
        fused = bool(kwargs.get("fused_lm_head"))
        last: Step | None = self._steps.here.get("step")
        if fused and last is not None and last.missing is not None:
            warnings.warn(
                "This trainer leaves the distillation loss out, because it makes its own loss from "
                "log-probabilities; use `MoDESFTTrainer`, or put `MoDETrainerMixin` before it.",
                stacklevel=2,
            )
        self._steps.here["step"] = self._measure(routes, loss, term if fused else None)
        if fused:
            return output
        if asked:
            output = type(output)(**{**output, "loss": loss.total, "logits": None})
            return output.to_tuple() if request.as_tuple else output
        if request.as_tuple:
            return (output[0] + term, *output[1:])
        output["loss"] = output["loss"] + term
        return output

    @staticmethod
    @torch.no_grad()
    def _measure(routes: Routes, loss: MixtureLoss, missing: Tensor | None) -> Step:
        num_tokens = max(loss.num_tokens, 1)
        whole_over_part = loss.num_items / num_tokens
        weights = loss.routing_weights
        mean = weights.sum(0) / num_tokens
        return Step(
            missing=missing,
            num_tokens=loss.num_tokens,
            task_loss=loss.task.detach() * whole_over_part,
            distillation_loss=loss.distillation.detach() * whole_over_part,
            distillation_weight=routes.mixture.config.distillation_weight,
            weight_per_token=loss.weight_per_token,
            routing_weights=mean,
            routing_variance=(weights - mean).square().sum(0) / num_tokens,
            routing_sparsity=(weights < UNUSED_WEIGHT).sum(0) / num_tokens,
            routing_entropy=torch.special.entr(weights).sum() / num_tokens,
            layer_losses=loss.layer_losses,
            late_layers=routes.mixture.late_layers,
        )
