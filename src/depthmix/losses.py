"""The training objective, as pure functions: `L = L_task + λ L_distill`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from depthmix.backbone import Backbone
from depthmix.config import IGNORE_INDEX
from depthmix.mixture import Routes, mix


@dataclass(frozen=True)
class MixtureLoss:
    """The two terms of the objective for one batch, in nats.

    Under gradient accumulation each is this micro-batch's share of the accumulated batch's value.
    """

    task: Float[Tensor, ""]
    """Cross-entropy of the mixture, `L_task`."""

    distillation: Float[Tensor, ""]
    """Divergence of the late layers from the final one, `L_distill`, before its weight λ."""

    total: Float[Tensor, ""]
    """`L_task + λ L_distill`, what the optimiser sees."""

    num_tokens: int
    """Label tokens of this batch."""

    num_items: float
    """Label tokens of the whole accumulated batch."""

    weight_per_token: float
    """What one nat of divergence at a token weighs against one nat of its cross-entropy."""


def divergence(
    log_probs: Float[Tensor, "*batch vocab"],
    teacher_log_probs: Float[Tensor, "*batch vocab"],
    kind: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl",
) -> Float[Tensor, "*batch"]:
    r"""Measure how far a late layer's prediction is from the final layer's.

    `reverse_kl` computes $\sum_v P_i (\log P_i - \log P_n)$, student first as the paper writes it
    (`F.kl_div(log_probs, teacher_probs)` computes the other direction); `forward_kl` computes
    $\sum_v P_n (\log P_n - \log P_i)$; `jsd` averages both layers' KL to their mean.

    Args:
        log_probs: Log-probabilities of the late layer, `log P_i`.
        teacher_log_probs: Log-probabilities of the final layer, `log P_n`.
        kind: Which divergence.

    Returns:
        Divergence in nats, 0 or more; `jsd` is at most ln 2.
    """
    if kind == "reverse_kl":
        return (log_probs.exp() * (log_probs - teacher_log_probs)).sum(-1)
    if kind == "forward_kl":
        return (teacher_log_probs.exp() * (teacher_log_probs - log_probs)).sum(-1)
    mean = torch.logaddexp(log_probs, teacher_log_probs) - math.log(2)
    student = (log_probs.exp() * (log_probs - mean)).sum(-1)
    teacher = (teacher_log_probs.exp() * (teacher_log_probs - mean)).sum(-1)
    return (student + teacher) / 2


def label_positions(
    labels: Int[Tensor, "batch seq"], *, shifted: bool = False
) -> tuple[Bool[Tensor, "batch seq"], Int[Tensor, " tokens"]]:
    """Find the positions whose next token counts in the loss.

    Args:
        labels: Token ids, `IGNORE_INDEX` where a token does not count.
        shifted: Whether `labels[:, t]` is already the token after position t, as in `shift_labels`.

    Returns:
        A mask of the positions that predict a label, and those labels in the mask's order.
    """
    if not shifted:
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    mask = labels != IGNORE_INDEX
    return mask, labels[mask]


def mixture_loss(
    routes: Routes,
    backbone: Backbone,
    labels: Int[Tensor, "batch seq"],
    *,
    num_items_in_batch: Tensor | int | None = None,
    num_sequences_in_batch: int | None = None,
    shifted: bool = False,
) -> MixtureLoss:
    r"""Compute the objective of a batch, plainly.

    Computes $L_\text{task} + \lambda L_\text{distill}$ with $L_\text{task}$ the cross-entropy of
    the ensemble's logits $\ell = \sum_i G_i \ell_i$ and
    $L_\text{distill} = \sum_{i<n} \mathrm{KL}(P_i \,\|\, P_n)$ (paper, section 3), the teacher
    $P_n$ detached, on label positions only, in float32.

    Args:
        routes: Normed states and routing weights of the forward pass.
        backbone: The model's head, scale and soft cap.
        labels: Token ids, `IGNORE_INDEX` where a token does not count.
        num_items_in_batch: Label tokens of the whole accumulated batch, over which the task loss
            is averaged; `None` averages over this batch's own.
        num_sequences_in_batch: Sequences of the whole accumulated batch, for `batchmean`; `None`
            takes this batch's sequences, scaled by its share of the label tokens.
        shifted: Whether the labels are already shifted by one.

    Returns:
        Both terms and their weighted sum, in nats. Without a label token all are zero, and still
        differentiable.
    """
    config = routes.mixture.config
    device, dtype = backbone.head_weight.device, backbone.head_weight.dtype
    mask, targets = label_positions(labels.to(routes.weights.device), shifted=shifted)
    weights = routes.weights[mask].to(device)  # (N, k)
    states = tuple(state[mask].to(device, dtype) for state in routes.states)  # k × (N, d)
    num_tokens = len(targets)
    num_items = float(num_items_in_batch) if num_items_in_batch is not None else float(num_tokens)
    num_items = max(num_items, 1.0)
    num_sequences = num_sequences_in_batch or len(labels) * num_items / max(num_tokens, 1)
    denominator = {"mean": num_items, "batchmean": num_sequences, "sum": 1.0}[config.reduction]

    distilled = config.distillation_weight > 0
    # Without distillation one head product is enough: the head of the mixture.
    mixed = (mix(states, weights).to(dtype),)
    projected = tuple(backbone.project(x).float() for x in (states if distilled else mixed))
    logits = mix(projected, weights) if distilled else projected[0]  # (N, V)
    targets = targets.to(logits.device)
    task = F.cross_entropy(backbone.cap(logits), targets, reduction="sum") / num_items
    distillation = torch.zeros_like(task)
    if distilled:
        *late, final = [backbone.cap(part).log_softmax(-1) for part in projected]
        for log_probs in late:
            per_token = divergence(log_probs, final.detach(), config.divergence)  # (N,)
            distillation = distillation + per_token.sum() / denominator
    return MixtureLoss(
        task=task,
        distillation=distillation,
        total=task + config.distillation_weight * distillation,
        num_tokens=num_tokens,
        num_items=num_items,
        weight_per_token=config.distillation_weight * num_items / denominator,
    )
