"""What exits lose, and its gradients, in one pass over the entries that their loss is on."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from depthmix.loss.exit_terms import ExitSums, ExitTokens, count_agreed
from depthmix.loss.linear_head import LinearHead

CPU_ROWS = 256
"""Rows of one product on the CPU, a token's exits and its teacher counted singly."""

GPU_ROWS = 4096
"""The same on an accelerator."""


def fused_exit_sums(
    states: Float[Tensor, "tokens exits width"],
    mixed: Float[Tensor, "tokens width"],
    tokens: ExitTokens,
    head: LinearHead,
) -> ExitSums:
    r"""Sum as `plain_exit_sums` does, with closed-form gradients, chunk by chunk.

    The head's rows for the chosen entries are taken once, for all exits and the teacher. A chunk's
    logits become $\partial L_e / \partial \ell_e = P_e - (1 - \kappa)\,
    \mathrm{onehot}(y) - \kappa P$, times the soft cap's slope, and multiplied with these rows at
    once.

    Args:
        states: What the head takes for each exit, in its dtype.
        mixed: What it takes for the model's own prediction; gets no gradient.
        tokens: The label tokens, as the exits see them.
        head: The whole head.

    Returns:
        Sums over tokens, float32 or wider, differentiable once with respect to `states`.
    """
    part = head if tokens.vocabulary is None else head.take(tokens.vocabulary)
    loss, nll, agreed = _FusedExitSums.apply(
        states, mixed, tokens.targets, part, tokens.distillation
    )
    return ExitSums(loss, nll, agreed)


class _FusedExitSums(torch.autograd.Function):
    """The sums, with gradients computed on the way forward."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        mixed: Tensor,
        targets: Tensor,
        head: LinearHead,
        distillation: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_exits, wide = states.shape[1], torch.promote_types(states.dtype, torch.float32)
        gradients = torch.empty_like(states)
        loss, nll, agreed = states.new_zeros(3, num_exits, dtype=wide)
        num_rows = CPU_ROWS if states.device.type == "cpu" else GPU_ROWS
        size = max(num_rows // (num_exits + 1), 1)
        buffer = head.weight.new_empty(size * (num_exits + 1), len(head.weight))
        with torch.autocast(states.device.type, enabled=False):
            for start in range(0, len(states), size):
                chosen = slice(start, start + size)
                own, labels = states[chosen], targets[chosen]
                logits = buffer[: len(own) * (num_exits + 1)]
                head.project(torch.cat([own.flatten(0, 1), mixed[chosen]]), out=logits)
                of_exits, of_teacher = logits.split([len(own) * num_exits, len(own)])
                teacher = head.predict(of_teacher.to(wide)).softmax(-1)
                predictions = head.predict(of_exits.view(len(own), num_exits, -1).to(wide))
                gradient, *losses = _differentiate(
                    predictions, teacher, labels, distillation=distillation, soft_cap=head.soft_cap
                )
                loss, nll, agreed = loss + losses[0], nll + losses[1], agreed + losses[2]
                narrow = gradient.flatten(0, 1).to(states.dtype)
                torch.mm(narrow, head.weight, out=gradients[chosen].flatten(0, 1))
        ctx.save_for_backward(gradients.mul_(head.scale / num_exits))
        ctx.mark_non_differentiable(nll, agreed)
        return loss.mean(), nll, agreed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple:  # pyrefly: ignore[bad-override]
        (gradients,) = ctx.saved_tensors
        return (gradients * grad_outputs[0]).to(gradients.dtype), *[None] * 4


def _differentiate(
    predictions: Float[Tensor, "tokens exits entries"],
    teacher: Float[Tensor, "tokens entries"],
    targets: Int[Tensor, " tokens"],
    *,
    distillation: float,
    soft_cap: float | None,
) -> tuple[
    Float[Tensor, "tokens exits entries"],
    Float[Tensor, " exits"],
    Float[Tensor, " exits"],
    Float[Tensor, " exits"],
]:
    """Give the gradient by the logits before the cap; with it loss, nll and agreement."""
    slope = None if soft_cap is None else 1 - (predictions / soft_cap).square()
    log_probs = predictions.log_softmax(-1)
    labels = targets[:, None, None].expand(-1, predictions.shape[1], 1)  # (m, e, 1)
    nll = -log_probs.gather(-1, labels)[..., 0].sum(0)
    of_teacher = -torch.einsum("mes,ms->e", log_probs, teacher)
    loss = (1 - distillation) * nll + distillation * of_teacher
    agreed = count_agreed(log_probs, teacher)
    gradient = predictions.softmax(-1)  # the exponential of small logarithms is slow on CPUs
    gradient.sub_(teacher[:, None], alpha=distillation)
    of_label = torch.full_like(labels, distillation - 1, dtype=teacher.dtype)
    gradient.scatter_add_(-1, labels, of_label)
    return gradient if slope is None else gradient.mul_(slope), loss, nll, agreed
