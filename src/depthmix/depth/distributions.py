"""Predictions over the vocabulary, and what is measured of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

TOKENS_AT_ONCE = 32
"""Tokens of which a divergence is computed at once; a CPU does not share out much fewer well."""


@dataclass(frozen=True)
class Distribution:
    """Predictions after some tokens, with what several measures need of them."""

    log_probs: Float[Tensor, "tokens vocab"]
    """Log-probabilities, nats."""

    probs: Float[Tensor, "tokens vocab"]
    """Probabilities."""

    negentropy: Float[Tensor, " tokens"]
    """`Σ p log p`, nats."""


def distribute(
    logits: Float[Tensor, "tokens vocab"], out: Float[Tensor, "tokens vocab"] | None = None
) -> Distribution:
    """Turn logits into predictions, in place: on a CPU fresh memory takes as long as the sums.

    Args:
        logits: In float32; they become the log-probabilities.
        out: Where to write the probabilities; `None` takes fresh memory.

    Returns:
        The predictions.
    """
    probs = torch.softmax(logits, -1, out=out)
    # log p = x - max x + log max p
    log_probs = logits.sub_(logits.amax(-1, keepdim=True)).add_(probs.amax(-1, keepdim=True).log())
    return Distribution(log_probs, probs, _inner(probs, log_probs))


def measure(
    predicted: Distribution,
    final: Distribution,
    targets: Int[Tensor, " targets"],
    top: int,
) -> dict[str, Tensor]:
    """Describe predictions, and compare them with the final layer's and with what came.

    Args:
        predicted: The predictions.
        final: The final layer's; the same object where they are its own.
        targets: The true next tokens, of which the last prediction may have none.
        top: How many of the likeliest tokens to keep.

    Returns:
        `top` and `top_probabilities` (tokens, top), `entropy` and `kl_to_final` in nats (tokens),
        and of the true tokens `loss` in nats, `probability` and `rank` (targets).
    """
    log_probs = predicted.log_probs
    likeliest = log_probs.topk(top)
    answered = log_probs[: len(targets)]
    true = answered.gather(1, targets[:, None])
    # A CPU sums truth values as floats several times faster, and exactly up to 2^24 of them.
    above = torch.gt(answered, true, out=torch.empty_like(answered)).sum(-1)
    if predicted is final:
        kl = torch.zeros_like(predicted.negentropy)
    else:
        kl = predicted.negentropy - _inner(predicted.probs, final.log_probs)
    return {
        "top": likeliest.indices,
        "top_probabilities": likeliest.values.exp(),
        "entropy": -predicted.negentropy,
        "kl_to_final": kl.clamp_min(0),
        "loss": -true[:, 0],
        "probability": true[:, 0].exp(),
        "rank": above.int() + 1,
    }


def jensen_shannon(predicted: Distribution, other: Distribution) -> Float[Tensor, " tokens"]:
    r"""Compute the Jensen-Shannon divergence from entropies: `divergence` takes thrice the time.

    With $s = p + q$, it is $(\sum p \log p + \sum q \log q - \sum s \log s) / 2 + \log 2$.

    Args:
        predicted: Some predictions.
        other: Others of the same tokens.

    Returns:
        The divergence of each pair, nats, at most ln 2.
    """
    tiny = torch.finfo(predicted.probs.dtype).tiny  # 0 log 0 = 0
    # Two small buffers serve all tokens: on a CPU fresh memory takes longer than the logarithms.
    num_tokens, vocabulary = predicted.probs.shape
    buffers = predicted.probs.new_empty(2, min(TOKENS_AT_ONCE, num_tokens), vocabulary)
    sums = []
    for own, others in zip(
        predicted.probs.split(TOKENS_AT_ONCE), other.probs.split(TOKENS_AT_ONCE), strict=True
    ):
        total, logs = buffers[:, : len(own)]
        torch.add(own, others, out=total).clamp_min_(tiny)
        sums.append(_inner(total, torch.log(total, out=logs)))
    entropies = predicted.negentropy + other.negentropy - torch.cat(sums)
    return (entropies / 2 + math.log(2)).clamp_min(0)


def _inner(
    left: Float[Tensor, "tokens vocab"], right: Float[Tensor, "tokens vocab"]
) -> Float[Tensor, " tokens"]:
    """Sum the products over the vocabulary, without a tensor of products."""
    return torch.linalg.vecdot(left, right)
