"""The element-wise part of the fused loss: logits of a few tokens in, gradients out, compiled."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

CPU_BLOCK_TOKENS = 16
"""Tokens of one block on the CPU: few enough to stay in cache."""

GPU_BLOCK_TOKENS = 256
"""Tokens of one block on an accelerator: enough to fill it."""

COMPILED_VOCAB_SIZE = 8192
"""Vocabulary from which compiling pays for itself."""


def block_tokens(device: torch.device) -> int:
    """Give the number of tokens in one block on this device."""
    return CPU_BLOCK_TOKENS if device.type == "cpu" else GPU_BLOCK_TOKENS


def differentiate_tokens(
    buffer: Float[Tensor, "chunk routes vocab"],
    weights: Float[Tensor, "tokens routes"],
    targets: Int[Tensor, " tokens"],
    **options: Any,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """Apply `differentiate_block` to all tokens, in blocks of one shape, so it is compiled once.

    Args:
        buffer: Head products of the tokens and, up to a full block, of anything else; overwritten.
        weights: Routing weights.
        targets: Label of each token.
        options: As `differentiate_block` takes them.

    Returns:
        What `differentiate_block` returns, for the tokens alone.
    """
    num_tokens, block = len(targets), block_tokens(buffer.device)
    padding = -num_tokens % block
    weights = F.pad(weights, (0, 0, 0, padding))
    targets = F.pad(targets, (0, padding))
    large = buffer.shape[-1] >= COMPILED_VOCAB_SIZE
    differentiate = _differentiate_compiled if large else differentiate_block
    losses = [
        differentiate(
            buffer[start : start + block],
            weights[start : start + block],
            targets[start : start + block],
            **options,
        )
        for start in range(0, num_tokens, block)
    ]
    nll, distances = zip(*losses, strict=True)
    return torch.cat(nll)[:num_tokens], torch.cat(distances)[:num_tokens]


@no_type_check  # the tests' type checks would stand between the compiler and its function
def differentiate_block(
    logits: Float[Tensor, "block routes vocab"],
    weights: Float[Tensor, "block routes"],
    targets: Int[Tensor, " block"],
    *,
    kind: str,
    scale: float,
    soft_cap: float | None,
) -> tuple[Float[Tensor, " block"], Float[Tensor, " block"]]:
    r"""Overwrite each route's logits with the gradient of the losses, token by token.

    The late routes' logits become the gradient of their own divergence from the final route, the
    final route's become the gradient of the task loss with respect to the ensemble's logits (both
    before `scale`). With $Z_i = \sum_v e^{\ell_i}$ the reverse divergence is
    $\sum_v P_i (\ell_i - \ell_n) - \log Z_i + \log Z_n$, which takes one pass with the sums.

    Args:
        logits: Head products of the routes, earliest layer first; overwritten.
        weights: Routing weights.
        targets: Label of each token.
        kind: The divergence.
        scale: Factor between head product and logits.
        soft_cap: c in `c tanh(logits / c)`, or None.

    Returns:
        Cross-entropy of the ensemble, and divergence summed over the late routes, in nats.
    """
    # Every maximum, then every sum, then every gradient: so the compiler makes three passes.
    wide = torch.promote_types(logits.dtype, weights.dtype)
    routes = [route.to(wide) * scale for route in logits.unbind(1)]  # k × (r, V)
    ensemble = weights[:, :1] * routes[0]
    for i, route in enumerate(routes[1:], start=1):
        ensemble = ensemble + weights[:, i : i + 1] * route
    predictions = [*routes, ensemble] if len(routes) > 1 else [ensemble]
    capped = [_cap(prediction, soft_cap) for prediction in predictions]
    predictions = [prediction for prediction, _ in capped]
    tops = [prediction.amax(-1, keepdim=True) for prediction in predictions]
    exps = [(x - top).exp() for x, top in zip(predictions, tops, strict=True)]
    sums = [exp.sum(-1, keepdim=True) for exp in exps]
    log_norms = [top + total.log() for top, total in zip(tops, sums, strict=True)]

    distances, gradients = torch.zeros_like(sums[0]), []
    for i in range(len(routes) - 1):
        student, teacher = predictions[i], predictions[-2]
        norm, teacher_norm = log_norms[i], log_norms[-2]
        if kind == "reverse_kl":
            mean = (exps[i] * (student - teacher)).sum(-1, keepdim=True) / sums[i]
            distance = mean - norm + teacher_norm
            gradient = (student - norm).exp() * (student - teacher - mean)
        elif kind == "forward_kl":
            mean = (exps[-2] * (teacher - student)).sum(-1, keepdim=True) / sums[-2]
            distance = mean - teacher_norm + norm
            gradient = (student - norm).exp() - (teacher - teacher_norm).exp()
        else:
            log_p, log_q = student - norm, teacher - teacher_norm
            log_mean = torch.logaddexp(log_p, log_q) - math.log(2)
            half = (log_p.exp() * (log_p - log_mean)).sum(-1, keepdim=True) / 2
            distance = half + (log_q.exp() * (log_q - log_mean)).sum(-1, keepdim=True) / 2
            gradient = log_p.exp() * ((log_p - log_mean) / 2 - half)
        distances = distances + distance
        gradients.append(gradient * capped[i][1])
    ensemble, slope = capped[-1]
    nll = log_norms[-1] - ensemble.gather(-1, targets[:, None])
    probs = (ensemble - log_norms[-1]).exp()
    is_target = torch.arange(ensemble.shape[-1], device=ensemble.device) == targets[:, None]
    gradients.append(torch.where(is_target, probs - 1, probs) * slope)
    logits.copy_(torch.stack([gradient.to(logits.dtype) for gradient in gradients], dim=1))
    return nll[:, 0], distances[:, 0]


@no_type_check
def _cap(logits: Tensor, soft_cap: float | None) -> tuple[Tensor, Tensor | float]:
    """Cap logits; give them with the cap's slope."""
    if soft_cap is None:
        return logits, 1.0
    share = torch.tanh(logits / soft_cap)
    return soft_cap * share, 1 - share * share


@functools.cache
def _compiler() -> Callable[..., tuple[Tensor, Tensor]]:
    """Make the compiled `differentiate_block`, one version per dtype, shape and option."""
    return torch.compile(differentiate_block, dynamic=False)


def _differentiate_compiled(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Apply the compiled `differentiate_block`, or the plain one where nothing compiles."""
    global _can_compile
    if _can_compile:
        try:
            return _compiler()(*tensors, **options)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            _can_compile = False
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(
                "The loss could not be compiled and runs uncompiled, which is slower; install a "
                f"C++ compiler, on a GPU Triton ({reason}).",
                stacklevel=2,
            )
    return differentiate_block(*tensors, **options)


_can_compile = True
