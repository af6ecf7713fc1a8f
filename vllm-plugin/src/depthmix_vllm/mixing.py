"""The mixture itself, in plain torch: what it computes is the same in every engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(nn.Module):
    """A late layer's norm, in float32 whatever the model's dtype.

    Args:
        hidden_size: Width of the residual stream.
        kind: `norm` of an export's settings: its `kind`, `eps` and, for `rms`, the `offset`.
        has_bias: Whether it has a bias, as a LayerNorm may.
    """

    def __init__(self, hidden_size: int, kind: Mapping[str, Any], *, has_bias: bool) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=torch.float32))
        bias = nn.Parameter(torch.zeros(hidden_size, dtype=torch.float32)) if has_bias else None
        self.register_parameter("bias", bias)

    def forward(self, states: Tensor) -> Tensor:
        """Norm states, (tokens, hidden), float32."""
        return normalise(states, self.weight, self.bias, self.kind)


class Mixture(nn.Module):
    r"""Router and late norms of an export: $\sum_i G_i N_i(h_i)$ with $G = \mathrm{softmax}(xW)$.

    Args:
        settings: `mixture_of_depths` of its configuration.
        hidden_size: Width of the residual stream.
        has_bias: Whether norms have biases.
    """

    def __init__(self, settings: Mapping[str, Any], hidden_size: int, *, has_bias: bool) -> None:
        super().__init__()
        self.settings = settings
        self.late_layers: list[int] = settings["late_layers"]
        kind = settings["norm"]
        self.norms = nn.ModuleDict(
            {str(i): Norm(hidden_size, kind, has_bias=has_bias) for i in settings["own_norms"]}
        )
        routes, bias = len(self.late_layers), settings["router_bias"]
        self.router = nn.Linear(hidden_size, routes, bias=bias, dtype=torch.float32)

    @property
    def depths(self) -> tuple[int, ...]:
        """Depths whose residual streams are read, increasing."""
        last = self.late_layers[-1]
        own = (last,) if str(last) in self.norms else ()
        return (self.late_layers[0] - 1, *self.late_layers[:-1], *own)

    def forward(
        self, states: Mapping[int, Tensor], normed: Tensor, final_norm: nn.Module
    ) -> Tensor:
        """Mix.

        Args:
            states: Residual stream at each of `depths`, (tokens, hidden).
            normed: What the model's final norm makes of the last layer's.
            final_norm: That norm; its weights serve late layers that have none of their own.

        Returns:
            The mixture in the dtype of `normed`, (tokens, hidden).
        """
        x = states[self.late_layers[0] - 1].float()
        if self.settings["router_input"] == "normed":
            x = F.rms_norm(x, x.shape[-1:])
        weights = route(self.router(x), self.settings["top_k"], self.settings["router_temperature"])
        mixed = None
        for place, layer in enumerate(self.late_layers):
            if str(layer) in self.norms:
                state = self.norms[str(layer)](states[layer])
            elif layer == self.late_layers[-1]:
                state = normed.float()
            else:
                bias = getattr(final_norm, "bias", None)
                kind = self.settings["norm"]
                state = normalise(states[layer], final_norm.weight, bias, kind)
            weight = weights[..., place : place + 1]
            mixed = weight * state if mixed is None else torch.addcmul(mixed, weight, state)
        assert mixed is not None  # there is a late layer
        return mixed.to(normed.dtype)


def route(logits: Tensor, top_k: int | None, temperature: float) -> Tensor:
    """Turn the router's logits, (tokens, routes), into weights that sum to one."""
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kept = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values)
    return logits.softmax(dim=-1)


def normalise(
    states: Tensor, weight: Tensor, bias: Tensor | None, kind: Mapping[str, Any]
) -> Tensor:
    """Norm states in float32, as an export's settings say.

    Args:
        states: (tokens, hidden), any dtype.
        weight: Of the norm.
        bias: Of the norm, if it has one.
        kind: `kind`, `eps` and, for `rms`, the `offset` that the weight is meant with.

    Returns:
        float32.
    """
    states, weight, size = states.float(), weight.float(), weight.shape
    if kind["kind"] == "layer":
        return F.layer_norm(
            states, size, weight, None if bias is None else bias.float(), kind["eps"]
        )
    offset = kind["offset"]
    return F.rms_norm(states, size, weight + offset if offset else weight, kind["eps"])
