"""Both terms of the objective and their gradients in one pass, without a logit kept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from depthmix.loss.block_gradients import block_tokens, differentiate_tokens
from depthmix.loss.fused_exits import fused_exit_sums
from depthmix.loss.linear_head import LinearHead, take_linear_head
from depthmix.loss.terms import LabelTokens, LossSums, divergence
from depthmix.method.backbone import Backbone
from depthmix.method.config import MixtureConfig
from depthmix.method.mixture import mix

CPU_PRODUCT_ROWS = 512
"""Rows of one head product on the CPU, a token's routes counted singly: enough for full speed."""

GPU_PRODUCT_ROWS = 2048
"""The same on an accelerator."""

BUCKET_SIZE = 16
"""Vocabulary entries of which `top_entries` looks at the maximum first."""

CPU_GATHERED_TOKENS = 64
"""Tokens whose own rows of the head are gathered at once, for `distillation_top_m`."""

GPU_GATHERED_TOKENS = 1024
"""The same on an accelerator."""


@torch.compiler.disable
def fused_sums(tokens: LabelTokens, backbone: Backbone, config: MixtureConfig) -> LossSums:
    r"""Sum both terms as `plain_sums` does, with closed-form gradients, chunk by chunk.

    Writes the logits of a chunk of tokens, overwrites them with the gradients
    $\partial L_\text{task} / \partial \ell = p - \mathrm{onehot}(y)$ and
    $\partial\,\mathrm{KL}_i / \partial \ell_i = P_i (\log P_i - \log P_n - \mathrm{KL}_i)$ (or
    those of the chosen divergence), and multiplies them with the head at once. Nothing of size
    (tokens, vocab) is kept. Tokens that are not distilled, and with `distillation_top_m` all of
    them, take one product each way (without gradients, forward alone); exactly distilled ones take
    one per route. The exits of the same tokens follow, over the entries that their loss is on
    (`fused_exit_sums`).

    Args:
        tokens: The label tokens.
        backbone: The model's head, which `is_fusable`, its scale and soft cap.
        config: The mixture's options.

    Returns:
        Sums over tokens in nats, float32 or wider, differentiable once with respect to the states
        and routing weights; with a head bias, the weights' gradient up to a constant per token,
        which no softmax sees.
    """
    head = take_linear_head(backbone)
    dtype = head.weight.dtype
    mixed = backbone.head_input(mix(tokens.states, tokens.weights).to(dtype))  # (N, d)
    distilled = slice(tokens.num_distilled)
    late = [backbone.head_input(state[distilled].to(dtype)) for state in tokens.states]
    late[-1] = late[-1].detach()  # the teacher
    states = torch.stack(late, dim=1)  # (n, k, d)
    task, distillation = _FusedSums.apply(
        mixed, states, tokens.weights.detach(), tokens.targets, head, config
    )
    exits = None
    if tokens.exits is not None:
        parts = [backbone.head_input(state.to(dtype)) for state in tokens.exits.states]
        exits = fused_exit_sums(torch.stack(parts, dim=1), mixed.detach(), tokens.exits, head)
    return LossSums(task, distillation, exits)


class _FusedSums(torch.autograd.Function):
    """Both sums, with gradients computed on the way forward.

    The ensemble's gradient belongs to `mixed = Σ G_i N_i(h_i)`, whose own graph hands it on to the
    routes and the router; `states` receive the distillation's gradient alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        mixed: Tensor,
        states: Tensor,
        weights: Tensor,
        targets: Tensor,
        head: LinearHead,
        config: MixtureConfig,
    ) -> tuple[Tensor, Tensor]:
        grad_mixed, grad_states = torch.empty_like(mixed), torch.empty_like(states)
        num_distilled, num_routes = states.shape[:2]
        num_exact = num_distilled if config.distillation_top_m is None else 0
        task, distillation = weights.new_zeros(()), weights.new_zeros(())
        differentiate = partial(
            differentiate_tokens, kind=config.divergence, scale=head.scale, soft_cap=head.soft_cap
        )
        with torch.autocast(mixed.device.type, enabled=False):
            for rows, buffer in _chunks(head, range(num_exact), num_routes=num_routes):
                logits = buffer[: len(rows)].flatten(0, 1)  # (m k, V)
                chosen = slice(rows.start, rows.stop)
                head.project(states[chosen].flatten(0, 1), out=logits)
                nll, distances = differentiate(buffer, weights[chosen], targets[chosen])
                task, distillation = task + nll.sum(), distillation + distances.sum()
                torch.mm(logits, head.weight, out=grad_states[chosen].flatten(0, 1))
                grad_mixed[chosen] = grad_states[chosen, -1]
            for rows, buffer in _chunks(head, range(num_exact, len(mixed)), num_routes=1):
                logits = buffer[: len(rows), 0]  # (m, V)
                chosen = slice(rows.start, rows.stop)
                head.project(mixed[chosen], out=logits)
                distilled = slice(rows.start, min(rows.stop, num_distilled))
                if distilled.start < distilled.stop:
                    distance, grad_states[distilled] = _distil_on_top(
                        logits[: distilled.stop - distilled.start], states[distilled], head, config
                    )
                    distillation = distillation + distance
                nll, _ = differentiate(buffer, weights.new_ones(len(rows), 1), targets[chosen])
                task = task + nll.sum()
                if ctx.needs_input_grad[0]:
                    torch.mm(logits, head.weight, out=grad_mixed[chosen])
        ctx.save_for_backward(grad_mixed.mul_(head.scale), grad_states.mul_(head.scale))
        return task, distillation

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple:  # pyrefly: ignore[bad-override]
        grad_task, grad_distillation = grad_outputs
        grad_mixed, grad_states = ctx.saved_tensors
        return (
            (grad_mixed * grad_task).to(grad_mixed.dtype),
            (grad_states * grad_distillation).to(grad_states.dtype),
            *[None] * 4,
        )


def top_entries(
    logits: Float[Tensor, "tokens vocab"], num_entries: int
) -> Int[Tensor, "tokens entries"]:
    """Find the likeliest entries of each token, as `logits.topk(num_entries).indices` in any order.

    The M largest entries lie in the M buckets with the largest maxima, or in what no bucket holds;
    only these are searched. The entries of a bucket lie far apart, so that maxima are taken fast.
    """
    num_buckets = logits.shape[-1] // BUCKET_SIZE
    if num_entries >= num_buckets:
        return logits.topk(min(num_entries, logits.shape[-1]), sorted=False).indices
    num_held = num_buckets * BUCKET_SIZE
    buckets = logits[:, :num_held].unflatten(-1, (BUCKET_SIZE, num_buckets))
    best = buckets.amax(1).topk(num_entries, sorted=False).indices  # (m, M)
    candidates = buckets.gather(2, best[:, None].expand(-1, BUCKET_SIZE, -1)).flatten(1)
    candidates = torch.cat([candidates, logits[:, num_held:]], dim=1)
    places = candidates.topk(num_entries, sorted=False).indices
    rank, bucket = places // num_entries, best.gather(1, places % num_entries)
    left_over = num_held + places - BUCKET_SIZE * num_entries
    return torch.where(rank < BUCKET_SIZE, rank * num_buckets + bucket, left_over)


def _distil_on_top(
    ensemble: Float[Tensor, "tokens vocab"],
    states: Float[Tensor, "tokens routes hidden"],
    head: LinearHead,
    config: MixtureConfig,
) -> tuple[Float[Tensor, ""], Float[Tensor, "tokens routes hidden"]]:
    """Distil on the ensemble's likeliest entries, renormalised; give the sum and its gradient."""
    assert config.distillation_top_m is not None
    num_gathered = CPU_GATHERED_TOKENS if states.device.type == "cpu" else GPU_GATHERED_TOKENS
    total, gradients = states.new_zeros((), dtype=torch.float32), []
    for logits, own in zip(ensemble.split(num_gathered), states.split(num_gathered), strict=True):
        kept = top_entries(logits, config.distillation_top_m)
        weight = F.embedding(kept, head.weight)  # (m, M, d)
        parts = torch.bmm(own, weight.transpose(1, 2))  # (m, k, M)
        parts = parts.to(torch.promote_types(parts.dtype, torch.float32))
        if head.bias is not None:
            parts = parts + head.bias[kept][:, None]
        with torch.enable_grad():
            parts = (parts * head.scale).requires_grad_()
            log_probs = head.cap(parts).log_softmax(-1)
            late, teacher = log_probs[:, :-1], log_probs[:, -1:].detach()
            distance = divergence(late, teacher.expand_as(late), config.divergence).sum()
        (gradient,) = torch.autograd.grad(distance, parts)
        total = total + distance.detach()
        gradients.append(torch.bmm(gradient.to(own.dtype), weight))
    return total, torch.cat(gradients)


def _chunks(
    head: LinearHead, tokens: range, *, num_routes: int
) -> Iterator[tuple[range, Float[Tensor, "chunk routes vocab"]]]:
    """Cut tokens into chunks, each with the same buffer of logits for at least as many tokens."""
    device, (vocab_size, _) = head.weight.device, head.weight.shape
    block = block_tokens(device)
    num_rows = CPU_PRODUCT_ROWS if device.type == "cpu" else GPU_PRODUCT_ROWS
    size = max(num_rows // (num_routes * block), 1) * block
    size = min(size, math.ceil(len(tokens) / block) * block)
    if not size:
        return
    buffer = head.weight.new_empty(size, num_routes, vocab_size)
    for start in range(0, len(tokens), size):
        yield tokens[start : start + size], buffer
