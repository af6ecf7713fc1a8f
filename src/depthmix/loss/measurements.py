"""What training passes measure of a mixture, and what the log says of many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from depthmix.loss.batch import MixtureLoss
from depthmix.method.mixture import Routes

UNUSED_WEIGHT = 1e-5
"""Routing weight below which a token makes no use of a route (the paper's sparsity)."""


@dataclass(frozen=True)
class Step:
    """What one training forward pass measured, over this pass's own label tokens."""

    missing: Float[Tensor, ""] | None
    """Weighted terms that the model's returned loss lacks, with their graph, or None."""

    weighted: Float[Tensor, ""]
    """The weighted distillation term, `λ L_distill`, as this pass's share of the loss; detached."""

    is_share: bool
    """Whether the terms are shares of an accumulated batch, whose label tokens the pass knew."""

    num_tokens: int
    """Label tokens."""

    task_loss: Float[Tensor, ""]
    """Cross-entropy of what the mixture's `task_loss` names, in nats, mean over label tokens."""

    distillation_loss: Float[Tensor, ""]
    """Divergence of the late layers in nats, reduced as the mixture says."""

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

    exit_losses: Float[Tensor, " exits"] | None = None
    """Cross-entropy of each exit with the labels in nats, mean over label tokens; none without."""

    exit_agreements: Float[Tensor, " exits"] | None = None
    """Share of the label tokens of which each exit's likeliest entry is the model's own."""

    exit_layers: tuple[int, ...] = ()
    """Layers of the exits."""


@torch.no_grad()
def measure(routes: Routes, loss: MixtureLoss, *, missing: Tensor | None, is_share: bool) -> Step:
    """Measure one training pass.

    Args:
        routes: Its routing.
        loss: Its objective.
        missing: Weighted terms that the loss lacks, with their graph, or None.
        is_share: Whether the objective's terms are shares of an accumulated batch.

    Returns:
        The measurements, over this pass's own label tokens.
    """
    num_tokens = max(loss.num_tokens, 1)
    whole_over_part = loss.num_items / num_tokens
    weights = loss.routing_weights
    mean = weights.sum(0) / num_tokens
    return Step(
        missing=missing,
        weighted=routes.mixture.config.distillation_weight * loss.distillation.detach(),
        is_share=is_share,
        num_tokens=loss.num_tokens,
        task_loss=loss.task.detach() * whole_over_part,
        distillation_loss=loss.distillation.detach() * whole_over_part,
        weight_per_token=loss.weight_per_token,
        routing_weights=mean,
        routing_variance=(weights - mean).square().sum(0) / num_tokens,
        routing_sparsity=(weights < UNUSED_WEIGHT).sum(0) / num_tokens,
        routing_entropy=torch.special.entr(weights).sum() / num_tokens,
        layer_losses=loss.layer_losses,
        late_layers=routes.mixture.late_layers,
        exit_losses=loss.exit_losses,
        exit_agreements=loss.exit_agreements,
        exit_layers=routes.mixture.exit_layers,
    )


@dataclass(frozen=True)
class Part:
    """The distillation term in one micro-batch's loss, beside the rest of it."""

    weighted: Float[Tensor, ""]
    """The term as it was minimised, weight and all."""

    rest: Float[Tensor, ""]
    """The loss without it."""


def log_entries(
    steps: Sequence[Step], parts: Sequence[Part], reduce: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """Average training passes over their label tokens, of all processes.

    A process without any takes part with zeros, for the others wait for it.

    Args:
        steps: What the passes measured.
        parts: What became of their distillation terms.
        reduce: Adds up a tensor over processes.

    Returns:
        The log's entries, by name.
    """
    last = steps[-1]
    totals = _sum_up(
        (
            step.num_tokens
            * torch.cat(
                [
                    torch.stack(
                        [
                            torch.ones_like(step.task_loss),
                            step.task_loss,
                            step.distillation_loss,
                            step.weight_per_token,
                            step.routing_entropy,
                        ]
                    ),
                    step.routing_weights,
                    step.routing_sparsity,
                    step.layer_losses,
                    *_of_exits(step),
                ]
            )
            for step in steps
        ),
        reduce,
    )
    num_tokens, num_routes = totals[0].clamp(min=1), len(last.late_layers)
    num_exits = len(last.exit_layers)
    losses, weights, sparsity, layer_losses, exit_losses, exit_agreements = (
        totals[1:] / num_tokens
    ).split([4, num_routes, num_routes, len(last.layer_losses), num_exits, num_exits])
    # Within steps and between them: float32 loses E[G²] - E[G]² where the weights hardly vary.
    spread = _sum_up(
        (
            step.num_tokens * (step.routing_variance + (step.routing_weights - weights).square())
            for step in steps
        ),
        reduce,
    )
    shares = _sum_up((torch.stack([part.weighted, part.rest.abs()]) for part in parts), reduce)
    weighted, rest = shares.tolist()
    task, distillation, per_token, entropy = losses.tolist()
    by_layer = {
        "routing_weight": (last.late_layers, weights),
        "routing_variance": (last.late_layers, spread / num_tokens),
        "routing_sparsity": (last.late_layers, sparsity),
        "layer_loss": (last.late_layers, layer_losses),  # may be empty
        "exit_loss": (last.exit_layers, exit_losses),
        "exit_agreement": (last.exit_layers, exit_agreements),
    }
    return {
        "task_loss": task,
        "distillation_loss": distillation,
        "distillation_share": weighted / (rest + weighted) if weighted else 0.0,
        "distillation_weight_per_token": per_token,
        "routing_entropy": entropy,
        **{
            f"{name}/layer_{layer}": value
            for name, (layers, values) in by_layer.items()
            for layer, value in zip(layers, values.tolist(), strict=False)
        },
    }


def _sum_up(rows: Iterable[Tensor], reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Add up over passes and processes."""
    return reduce(torch.stack(list(rows)).sum(0))


def _of_exits(step: Step) -> list[Tensor]:
    """List what a pass measured of its exits, nothing where it has none."""
    return [one for one in (step.exit_losses, step.exit_agreements) if one is not None]
