"""The objective's place in training: where `λ L_distill` joins the model's own loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from depthmix.capture import PassState
from depthmix.losses import MixtureLoss, label_positions, mixture_loss
from depthmix.mixture import MixtureNorm, Routes


@dataclass(frozen=True)
class Step:
    """What one training forward pass measured."""

    loss: MixtureLoss
    """Both terms of the objective, this pass's share of an accumulated batch."""

    task_loss: Float[Tensor, ""]
    """Cross-entropy of the ensemble in nats, mean over this pass's label tokens."""

    distillation_loss: Float[Tensor, ""]
    """Divergence of the late layers in nats, reduced over this pass as the mixture says."""

    distillation_weight: float
    """λ."""

    routing_weights: Float[Tensor, " routes"]
    """Routing weight of each route, mean over label tokens."""

    routing_entropy: Float[Tensor, ""]
    """Entropy of the routing weights in nats, mean over label tokens; at most ln k."""

    late_layers: tuple[int, ...]
    """Layers of the routes."""

    distilled: bool
    """Whether the loss that the model returned holds the distillation term already."""


class Objective:
    """Adds the weighted distillation loss to the loss of the model's own forward pass.

    A forward hook on the language model sees labels, output and routes on every path: `Trainer`,
    a plain loop, PEFT with or without a task type. It acts in training mode only, so an evaluation
    loss is the cross-entropy of the ensemble.

    TRL's fused head returns log-probabilities, from which `SFTTrainer` makes its own loss; there
    the term is left to `MoDETrainerMixin`, which `take`s the step.

    Args:
        norm: The mixture, in its place.
    """

    def __init__(self, norm: MixtureNorm) -> None:
        self.norm = norm
        self._routes = PassState()
        self._steps = PassState()
        norm.listener = self._keep
        self._handle = norm.backbone.model.register_forward_hook(self._join, with_kwargs=True)

    def take(self) -> Step | None:
        """Hand over the last training pass's measurements, once."""
        return self._steps.take().get("step")

    def remove(self) -> None:
        """Leave the model's loss alone from now on."""
        self.norm.listener = None
        self._handle.remove()

    def _keep(self, routes: Routes) -> None:
        if self.norm.training and torch.is_grad_enabled():
            self._routes.here["routes"] = routes

    def _join(self, _model: nn.Module, _args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Compute the objective of a pass with labels and add its distillation term."""
        routes: Routes | None = self._routes.take().get("routes")
        shifted = kwargs.get("shift_labels") is not None
        labels = kwargs["shift_labels"] if shifted else kwargs.get("labels")
        if routes is None or labels is None:
            return output
        loss = mixture_loss(
            routes,
            self.norm.backbone,
            labels,
            num_items_in_batch=kwargs.get("num_items_in_batch"),
            shifted=shifted,
        )
        fused = bool(kwargs.get("fused_lm_head"))
        self._steps.here["step"] = self._measure(routes, loss, labels, shifted, not fused)
        weight = routes.mixture.config.distillation_weight
        if fused or weight == 0:
            return output
        if isinstance(output, tuple):
            return (output[0] + weight * loss.distillation, *output[1:])
        output.loss = output.loss + weight * loss.distillation
        return output

    @staticmethod
    @torch.no_grad()
    def _measure(
        routes: Routes, loss: MixtureLoss, labels: Tensor, shifted: bool, distilled: bool
    ) -> Step:
        mask, _ = label_positions(labels.to(routes.weights.device), shifted=shifted)
        weights = routes.weights[mask]  # (N, k)
        entropy = torch.special.entr(weights).sum(-1)
        config = routes.mixture.config
        scale = 1 if config.reduction == "sum" else loss.whole_over_part
        return Step(
            loss=loss,
            task_loss=loss.task.detach() * loss.whole_over_part,
            distillation_loss=loss.distillation.detach() * scale,
            distillation_weight=config.distillation_weight,
            routing_weights=weights.mean(0),
            routing_entropy=entropy.mean(),
            late_layers=routes.mixture.late_layers,
            distilled=distilled,
        )
