"""The objective of one batch, all its terms, by the way that suits the head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from peft.utils.integrations import gather_params_ctx
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from depthmix.loss.exit_terms import ExitSums
from depthmix.loss.fused import fused_sums
from depthmix.loss.linear_head import is_fusable
from depthmix.loss.terms import LabelTokens, LossSums, plain_sums, select_tokens
from depthmix.method.backbone import Backbone
from depthmix.method.config import MixtureConfig
from depthmix.method.mixture import Mixture, Routes

CHECKPOINTED_TOKENS = 128
"""Label tokens whose logits exist at once where the head cannot be fused."""


@dataclass(frozen=True)
class MixtureLoss:
    """The terms of the objective for one batch, in nats.

    Under gradient accumulation each is this micro-batch's share of the accumulated batch's value.
    """

    task: Float[Tensor, ""]
    """Cross-entropy of what `task_loss` names, `L_task`."""

    distillation: Float[Tensor, ""]
    """Divergence of the late layers from the final one, `L_distill`, before its weight λ."""

    total: Float[Tensor, ""]
    """`L_task + λ L_distill`, plus the exits' weighted loss: what the optimiser sees."""

    num_tokens: int
    """Label tokens of this batch."""

    num_items: Float[Tensor, ""]
    """Label tokens of the whole accumulated batch, at least 1."""

    weight_per_token: Float[Tensor, ""]
    """What one nat of divergence at a token weighs against one nat of its cross-entropy."""

    routing_weights: Float[Tensor, "tokens routes"]
    """Routing weights of the label tokens, detached, in any order."""

    layer_losses: Float[Tensor, " layers"]
    """Cross-entropy of each late layer alone, mean over this batch's label tokens, detached; empty
    without `log_layer_losses`."""

    exit_losses: Float[Tensor, " exits"]
    """Cross-entropy of each exit with the labels, mean over this batch's label tokens, detached;
    empty without exits. Predictions are renormalised on the entries that the exits' loss is on."""

    exit_agreements: Float[Tensor, " exits"]
    """Share of this batch's label tokens of which each exit's likeliest of these entries is the
    model's own, detached; empty without exits."""


def mixture_loss(
    routes: Routes,
    backbone: Backbone,
    labels: Int[Tensor, "batch seq"],
    *,
    num_items_in_batch: Tensor | int | None = None,
    num_sequences_in_batch: int | None = None,
    shifted: bool = False,
    exit_distillation: float | None = None,
    plain: bool = False,
) -> MixtureLoss:
    r"""Compute the objective of a batch, on label positions only.

    Computes $L_\text{task} + \lambda L_\text{distill}$ (paper, section 3), plus $\alpha
    L_\text{exits}$ where exits are trained together with the rest, in float32, where
    $L_\text{task}$ is the cross-entropy of the ensemble, of one late layer's $\phi(N_j(h_j))$, or
    the mean of every late layer's own (`MixtureConfig.task_loss`). A frozen linear head takes
    `fused_sums`: closed-form gradients, no logits kept. Any other head (trained, adapted,
    quantised) takes `plain_sums` on chunks of tokens under activation checkpointing.

    Args:
        routes: Normed states and routing weights of the forward pass.
        backbone: The model's head, scale and soft cap.
        labels: Token ids, `IGNORE_INDEX` where a token does not count.
        num_items_in_batch: Label tokens of the whole accumulated batch, over which the task loss
            is averaged; `None` averages over this batch's own.
        num_sequences_in_batch: Sequences of the whole accumulated batch, for `batchmean`; `None`
            takes this batch's sequences, scaled by its share of the label tokens.
        shifted: Whether the labels are already shifted by one.
        exit_distillation: Stands for the option of that name, where it is given.
        plain: Take the reference, `plain_sums` with every logit in memory.

    Returns:
        The terms and their weighted sum, in nats. Without a label token all are zero, and still
        differentiable.
    """
    config, head = routes.mixture.config, backbone.head
    device = backbone.head_weight.device
    tokens = select_tokens(
        routes, labels, backbone=backbone, shifted=shifted, exit_distillation=exit_distillation
    )
    num_tokens = len(tokens.targets)
    counted = num_tokens if num_items_in_batch is None else num_items_in_batch
    num_items = torch.as_tensor(counted, dtype=torch.float32, device=device).clamp(min=1)
    thrifty_sums = fused_sums if is_fusable(head) else _checkpointed_sums
    sums_of = partial(plain_sums if plain else thrifty_sums, backbone=backbone, config=config)
    with gather_params_ctx(list(head.parameters())):  # DeepSpeed may have them partitioned
        sums, layer_sums = _sum_terms(tokens, routes.mixture, sums_of)

    if config.reduction == "mean":
        denominator = num_items
    elif config.reduction == "sum":
        denominator = torch.ones_like(num_items)
    elif num_sequences_in_batch is not None:
        denominator = torch.full_like(num_items, num_sequences_in_batch)
    else:
        denominator = len(labels) * num_items / max(num_tokens, 1)
    scale = num_tokens / max(tokens.num_distilled, 1)  # the distilled tokens stand for all
    task, distillation = sums.task / num_items, scale * sums.distillation / denominator
    total = task + config.distillation_weight * distillation
    exit_losses = exit_agreements = sums.task.new_zeros(0)
    if sums.exits is not None:
        total = total + config.exit_weight * sums.exits.loss / num_items
        exit_losses = sums.exits.nll / max(num_tokens, 1)
        exit_agreements = sums.exits.agreed / max(num_tokens, 1)
    return MixtureLoss(
        task=task,
        distillation=distillation,
        total=total,
        num_tokens=num_tokens,
        num_items=num_items,
        weight_per_token=config.distillation_weight * num_items / denominator,
        routing_weights=tokens.weights.detach(),
        layer_losses=layer_sums / max(num_tokens, 1),
        exit_losses=exit_losses,
        exit_agreements=exit_agreements,
    )


def _sum_terms(
    tokens: LabelTokens, mixture: Mixture, sums_of: Callable[[LabelTokens], LossSums]
) -> tuple[LossSums, Float[Tensor, " layers"]]:
    """Sum both terms and, where it is logged, each late layer's own cross-entropy.

    A layer's is the ensemble's with all weight on that layer. How often `sums_of` is called depends
    on the options alone, not on this process's tokens, for each call gathers a sharded head.
    """
    config = mixture.config
    alone = [sums_of(tokens.answered_by(route)).task for route in mixture.task_routes]
    if not alone:
        sums = sums_of(tokens)
    elif config.has_term:
        sums = replace(sums_of(tokens), task=torch.stack(alone).mean())
    else:
        sums = LossSums(torch.stack(alone).mean(), torch.zeros_like(alone[0]))
    if not config.log_layer_losses:
        return sums, sums.task.new_zeros(0)
    if config.task_loss != "layers":
        with torch.no_grad():
            routes = range(config.num_routes)
            alone = [sums_of(tokens.answered_by(route)).task for route in routes]
    return sums, torch.stack(alone).detach()


def _checkpointed_sums(tokens: LabelTokens, backbone: Backbone, config: MixtureConfig) -> LossSums:
    """Sum as `plain_sums` does, with the logits of one chunk of tokens in memory at a time."""
    sums = [
        checkpoint(plain_sums, chunk, backbone, config, use_reentrant=False)
        for chunk in tokens.split(CHECKPOINTED_TOKENS)
    ]
    return LossSums(
        torch.stack([part.task for part in sums]).sum(),
        torch.stack([part.distillation for part in sums]).sum(),
        ExitSums.add([part.exits for part in sums if part.exits is not None])
        if tokens.exits
        else None,
    )
