"""A mixture's settings as engines read them, which know nothing of depthmix."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthmix.adapters.merged import Parts
from depthmix.method.trained_parts import apply_norm

EPSILONS = ("variance_epsilon", "eps", "epsilon")
"""What norms call the number that keeps them from dividing by zero."""

SIZE = 3.0
"""Size of the random states on which a norm is tried."""


def describe_mixture(parts: Parts) -> dict[str, Any]:
    """Say what an engine must know to run a mixture.

    Args:
        parts: A model with a mixture.

    Returns:
        In JSON's types: `late_layers`, increasing; `own_norms`, those of them that have a norm of
        their own; `norm`, what kind it is; how the router reads and what it does; and where the
        layers and the final norm are in transformers' model.
    """
    mixture, backbone = parts.mixture, parts.backbone
    assert mixture is not None  # callers have one
    return {
        "late_layers": list(mixture.late_layers),
        "own_norms": [int(layer) for layer in mixture.norms],
        "norm": describe_norm(backbone.final_norm),
        "router_bias": mixture.router.bias is not None,
        "router_input": mixture.config.router_input,
        "router_temperature": mixture.config.router_temperature,
        "top_k": mixture.top_k,
        "decoder_layers": backbone.layers_name,
        "final_norm": backbone.final_norm_name,
    }


@torch.no_grad()
def describe_norm(norm: nn.Module) -> dict[str, Any] | None:
    r"""Find out by trying what a norm computes.

    Args:
        norm: A model's final norm.

    Returns:
        `kind` (`rms` for $x / \mathrm{rms}(x) \odot (w + o)$, `layer` for LayerNorm), `eps` and,
        for `rms`, the `offset` o, which is 1 in Gemma; `None` for a norm that is none of these.
    """
    eps = next((value for name in EPSILONS if (value := getattr(norm, name, None))), None)
    weight = getattr(norm, "weight", None)
    if eps is None or not isinstance(weight, Tensor):
        return None
    generator = torch.Generator().manual_seed(0)
    states = SIZE * torch.randn(4, weight.numel(), generator=generator).to(weight.device)
    given = apply_norm(norm, states).float()
    scaled = F.rms_norm(states, states.shape[-1:], eps=eps)
    bias = getattr(norm, "bias", None)
    layer = F.layer_norm(
        states, states.shape[-1:], weight.float(), None if bias is None else bias.float(), eps
    )
    candidates = [
        ({"kind": "rms", "eps": eps, "offset": 0.0}, scaled * weight.float()),
        ({"kind": "rms", "eps": eps, "offset": 1.0}, scaled * (1 + weight.float())),
        ({"kind": "layer", "eps": eps}, layer),
    ]
    return next(
        (found for found, tried in candidates if torch.allclose(given, tried, 1e-3, 1e-4)), None
    )
