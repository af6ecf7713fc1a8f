r"""What the fused loss is compared with: the paper read literally, and what libraries offer.

Every function has one signature and gives the mean over label tokens, in nats, of

$-\log P(y) + \lambda \sum_{i<n} \mathrm{KL}(P_i \| P_n)$

where $P$ is the ensemble and the teacher $P_n$ is detached, differentiable with respect to
`states` and `weights`. The arguments are

- `states`: normed states `N_i(h_i)`, one (N, d) tensor per late layer, in the head's dtype;
- `weights`: routing weights `G`, (N, k), float32, rows summing to one;
- `head_weight`: the frozen head, (V, d), bfloat16 or float32;
- `labels`: (N,), already shifted, `IGNORE_INDEX` where a token does not count;
- `distillation_weight`: `λ`.

The `ce_` functions are the cross-entropy of the last state alone, what plain tuning costs; they
ignore `weights` and `λ`. Libraries are imported by the functions that need them.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from depthmix.method.config import IGNORE_INDEX

States = tuple[Tensor, ...]

CHECKPOINT_TOKENS = 256
"""Tokens of one chunk under activation checkpointing."""

LIGER_TOKENS = 256
"""Tokens of one of Liger's chunks: as fast on the CPU as its default of 1,024, with less memory."""

LIGER_COMPILED = True
"""Whether Liger compiles its chunks, as by default: needs a compiler, and two warm-ups per `λ`."""


def mode_naive(
    states: States, weights: Tensor, head_weight: Tensor, labels: Tensor, distillation_weight: float
) -> Tensor:
    """Compute what the paper writes: k head products over all positions, float32 logits kept."""
    total = _naive_sum(states, weights, head_weight, labels, distillation_weight)
    return total / (labels != IGNORE_INDEX).sum()


def mode_checkpointed(
    states: States, weights: Tensor, head_weight: Tensor, labels: Tensor, distillation_weight: float
) -> Tensor:
    """Compute `mode_naive` chunk by chunk, the logits recomputed in the backward pass."""
    total = weights.new_zeros(())
    for start in range(0, len(labels), CHECKPOINT_TOKENS):
        rows = slice(start, start + CHECKPOINT_TOKENS)
        some = tuple(state[rows] for state in states), weights[rows], head_weight, labels[rows]
        total = total + checkpoint(_naive_sum, *some, distillation_weight, use_reentrant=False)
    return total / (labels != IGNORE_INDEX).sum()


def mode_liger(
    states: States, weights: Tensor, head_weight: Tensor, labels: Tensor, distillation_weight: float
) -> Tensor:
    """Compose Liger-Kernel's chunked losses: one for the mixture, one per late layer below it.

    The hard loss takes the mixture of states, whose logits are the mixture of logits; each late
    layer takes the chunked distillation loss with a reverse KL. Only label tokens are passed in.
    All of it is torch, so it runs without Triton. Liger's limits: the head's gradient is computed
    for every loss though the head is frozen, and the teacher's product for every late layer.
    """
    states, weights, labels = _select(states, weights, labels)
    loss = ce_liger((_mix(states, weights),), weights, head_weight, labels, 0.0)
    teacher = (states[-1].detach(), head_weight)
    for student in states[:-1]:
        factors = (0.0, distillation_weight)  # of hard and soft loss
        loss = loss + _liger_loss((student, head_weight), teacher, labels, factors)
    return loss


def mode_trl(
    states: States, weights: Tensor, head_weight: Tensor, labels: Tensor, distillation_weight: float
) -> Tensor:
    """Compose TRL's tiled losses: log-probabilities of the mixture, one divergence per late layer.

    Only label tokens are passed in, as TRL does where it has Triton. TRL's limits: the teacher's
    product is taken for every late layer, every product again in the backward pass, and without
    CUDA the divergence's products are in float32 whatever the head's dtype.
    """
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    states, weights, labels = _select(states, weights, labels)
    loss = ce_trl((_mix(states, weights),), weights, head_weight, labels, 0.0)
    teacher = (states[-1].detach(), head_weight, None)
    for student in states[:-1]:
        beta = 1.0  # reverse KL
        distance, _ = ChunkedDivergenceFunction.apply(student, head_weight, None, *teacher, beta)
        loss = loss + distillation_weight * distance.mean()
    return loss


def ce_naive(
    states: States, weights: Tensor, head_weight: Tensor, labels: Tensor, distillation_weight: float
) -> Tensor:
    """Compute plain cross-entropy as Hugging Face does, on float32 logits of all positions."""
    logits = F.linear(states[-1], head_weight).float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)


def ce_torch(
    states: States, weights: Tensor, head_weight: Tensor, labels: Tensor, distillation_weight: float
) -> Tensor:
    """Compute plain cross-entropy with torch's chunked function; the loss has the head's dtype.

    Raises:
        RuntimeError: If this torch lacks it.
    """
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise RuntimeError(
            "`ce_torch` needs torch.nn.LinearCrossEntropyOptions, for a loss that is chunked; "
            f"torch {torch.__version__} has none, install torch 2.13 or later."
        )
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(states[-1], head_weight, labels, options=options)


def ce_trl(
    states: States, weights: Tensor, head_weight: Tensor, labels: Tensor, distillation_weight: float
) -> Tensor:
    """Compute plain cross-entropy with TRL's tiled log-probabilities, of label tokens only."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as VOCAB_CHUNK

    (state,), _, labels = _select(states[-1:], weights, labels)
    options = (1.0, VOCAB_CHUNK, None, 1.0, ())  # temperature, chunk, soft cap, scale, statistics
    log_probs, *_ = ChunkedLogProbFunction.apply(state, head_weight, None, labels, *options)
    return -log_probs.mean()


def ce_liger(
    states: States, weights: Tensor, head_weight: Tensor, labels: Tensor, distillation_weight: float
) -> Tensor:
    """Compute plain cross-entropy with the hard loss of Liger's chunked distillation.

    Its teacher has no vocabulary and costs nothing. Liger's usual cross-entropy of a linear head
    is a Triton kernel, which cannot run on the CPU; this one computes the head's gradient always.
    """
    teacher = (states[-1].detach(), head_weight[:0])
    return _liger_loss((states[-1], head_weight), teacher, labels, (1.0, 0.0))


def _naive_sum(
    states: States, weights: Tensor, head_weight: Tensor, labels: Tensor, distillation_weight: float
) -> Tensor:
    """Sum the objective over label tokens, in the paper's words."""
    parts = [F.linear(state, head_weight).float() for state in states]  # k × (N, V)
    logits = sum(weights[:, i, None] * part for i, part in enumerate(parts))
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    *late, final = [part.log_softmax(-1) for part in parts]
    for student in late:
        distances = (student.exp() * (student - final.detach())).sum(-1)  # (N,)
        loss = loss + distillation_weight * (distances * (labels != IGNORE_INDEX)).sum()
    return loss


def _select(states: States, weights: Tensor, labels: Tensor) -> tuple[States, Tensor, Tensor]:
    """Keep the tokens that count."""
    mask = labels != IGNORE_INDEX
    return tuple(state[mask] for state in states), weights[mask], labels[mask]


def _mix(states: States, weights: Tensor) -> Tensor:
    """Average the states in float32, and go back to the head's dtype."""
    mixed = sum(weights[:, i, None] * state for i, state in enumerate(states))
    return mixed.to(states[0].dtype)


def _liger_loss(student: States, teacher: States, labels: Tensor, factors: tuple) -> Tensor:
    """Call Liger's chunked distillation on two pairs of state and head, without biases."""
    options = (1.0, IGNORE_INDEX, 1.0, LIGER_COMPILED, LIGER_TOKENS)  # beta, _, temperature, …
    return _liger_function().apply(*student, *teacher, labels, None, None, *factors, *options)


@cache
def _liger_function() -> type[torch.autograd.Function]:
    """Derive Liger's chunked distillation with a KL in float32, or none without a teacher."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction as ChunkedJSD

    class ReverseKL(ChunkedJSD):
        @staticmethod
        def distillation_loss_fn(student_logits, teacher_logits, **options):
            if not teacher_logits.shape[-1]:
                return student_logits.new_zeros((), dtype=torch.float32)
            logits = student_logits.float(), teacher_logits.float()
            return ChunkedJSD.distillation_loss_fn(*logits, **options)

    return ReverseKL
