"""The mixture of depths: a router, late norms, and how they predict together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from depthmix.method.config import MixtureConfig
from depthmix.method.exits import Exits
from depthmix.method.trained_parts import WideLinear, apply_norm, copy_norm

ROUTER_STD = 0.02
"""Standard deviation of the router's Gaussian start (paper)."""

IDENTITY_SHARE = 0.99
"""Routing weight of the final layer at the router's identity start. With all of it there,
the task loss would give neither the router nor the other layers' norms a gradient."""


@dataclass(frozen=True)
class Routes:
    """The predictions of one forward pass, before they are mixed."""

    states: tuple[Float[Tensor, "batch seq hidden"], ...]
    """Normed states `N_i(h_i)`, one per late layer, earliest first."""

    weights: Float[Tensor, "batch seq routes"]
    """Routing weights `G`, float32, summing to one over the routes."""

    mixture: Mixture
    """The mixture that made them."""

    exit_states: Mapping[int, Float[Tensor, "batch seq hidden"]] = field(default_factory=dict)
    """Residual stream at each exit's layer, in training; empty otherwise and without exits."""


def route(
    logits: Float[Tensor, "*batch routes"], *, top_k: int | None = None, temperature: float = 1.0
) -> Float[Tensor, "*batch routes"]:
    r"""Turn the router's logits into routing weights.

    Computes $G = \mathrm{softmax}(\mathrm{TopK}(x W_g) / \tau)$ (paper, section 3), where
    coordinates outside the top K are −∞, so that the weights are renormalised over the kept ones.

    Args:
        logits: Router logits `x W_g`, one per route.
        top_k: Routes kept per token; `None` keeps all.
        temperature: τ, positive.

    Returns:
        Weights in [0, 1] that sum to one, in float32.
    """
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kept = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -math.inf).scatter(-1, kept.indices, kept.values)
    return logits.softmax(dim=-1)


def mix(
    states: tuple[Float[Tensor, "*batch hidden"], ...], weights: Float[Tensor, "*batch routes"]
) -> Float[Tensor, "*batch hidden"]:
    r"""Average the normed states of the late layers.

    Computes $\sum_i G_i N_i(h_i)$. The head is affine and the weights sum to one, so the head's
    product with it is the paper's ensemble of logits, $\sum_i G_i\,\phi(N_i(h_i))$.

    Args:
        states: Normed states `N_i(h_i)`, one per route.
        weights: Routing weights `G`, summing to one.

    Returns:
        The mixture, accumulated in the weights' dtype or wider.
    """
    mixed = weights[..., :1] * states[0]
    for i, state in enumerate(states[1:], start=1):
        mixed = torch.addcmul(mixed, weights[..., i : i + 1], state.to(mixed.dtype))
    return mixed


class Mixture(nn.Module):
    """The trainable part of MoDE: one norm per late layer and a router, beside them its exits.

    Args:
        config: The mixture's options.
        final_norm: The pretrained final norm `N_p`, copied as the start of each late norm.
        late_layers: Layers of the ensemble, increasing; the last one is the final layer.
        hidden_size: Width of the residual stream, d.
    """

    norms: nn.ModuleDict
    router: WideLinear
    exits: Exits | None

    def __init__(
        self,
        config: MixtureConfig,
        *,
        final_norm: nn.Module,
        late_layers: tuple[int, ...],
        hidden_size: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.top_k = config.top_k  # `set_top_k` changes it here, and leaves what is saved alone
        self.late_layers = late_layers
        own = list(late_layers[:-1]) if config.train_late_norms else []
        own += [late_layers[-1]] if config.train_final_norm else []
        self.norms = nn.ModuleDict({str(layer): copy_norm(final_norm) for layer in own})
        num_routes, identity = len(late_layers), config.router_init == "identity"
        self.router = WideLinear(hidden_size, num_routes, bias=identity)
        with torch.no_grad():
            if identity:
                rest = (1 - IDENTITY_SHARE) / max(num_routes - 1, 1)
                self.router.weight.zero_()
                self.router.bias.zero_()
                self.router.bias[-1] = config.router_temperature * math.log(IDENTITY_SHARE / rest)
            else:
                self.router.weight.normal_(std=ROUTER_STD)
        self.exits = None
        if config.exits is not None:
            with torch.random.fork_rng(devices=[]):  # what is drawn later is as without them
                self.exits = Exits(
                    config.exits,
                    rank=config.exit_rank,
                    final_norm=final_norm,
                    hidden_size=hidden_size,
                    num_hidden_layers=late_layers[-1],
                )

    @property
    def depths(self) -> tuple[int, ...]:
        """Depths whose residual streams the mixture reads below the final layer's."""
        return (self.late_layers[0] - 1, *self.late_layers[:-1])

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Layers whose exits are trained with the mixture; none of them is a member of it."""
        return () if self.exits is None else self.exits.layers

    @property
    def task_routes(self) -> tuple[int, ...]:
        """Places of the late layers whose own losses are the task loss; none for the ensemble's."""
        task_loss = self.config.task_loss
        if isinstance(task_loss, int):
            return (self.late_layers.index(task_loss),)
        return tuple(range(len(self.late_layers))) if task_loss == "layers" else ()

    def weigh(
        self, router_input: Float[Tensor, "batch seq hidden"]
    ) -> Float[Tensor, "batch seq routes"]:
        """Route each token, `G(h_{n-k})`, in float32 whatever the trunk's dtype or autocast.

        Args:
            router_input: Residual stream below the first late layer.

        Returns:
            Routing weights, float32, summing to one over the routes.
        """
        x = router_input.float()
        if self.config.router_input == "normed":
            x = F.rms_norm(x, x.shape[-1:])
        logits = self.router(x)
        return route(logits, top_k=self.top_k, temperature=self.config.router_temperature)

    def norm(
        self,
        layer: int,
        hidden_states: Float[Tensor, "batch seq hidden"],
        final_norm: nn.Module,
    ) -> Float[Tensor, "batch seq hidden"]:
        """Apply the norm of a late layer, `N_i(h_i)`; `final_norm` serves where it has none."""
        if str(layer) not in self.norms:
            return final_norm(hidden_states)
        return apply_norm(self.norms[str(layer)], hidden_states)

    def forward(
        self, hidden_states: Mapping[int, Float[Tensor, "batch seq hidden"]], final_norm: nn.Module
    ) -> Routes:
        """Norm the late hidden states and route each token.

        Args:
            hidden_states: Residual streams by layer: each late layer's, the one below them and, in
                training, each exit's.
            final_norm: The pretrained final norm `N_p`.

        Returns:
            The normed states and routing weights, not yet mixed.
        """
        states = tuple(
            self.norm(layer, hidden_states[layer], final_norm) for layer in self.late_layers
        )
        exits = {i: hidden_states[i] for i in self.exit_layers if i in hidden_states}
        return Routes(states, self.weigh(hidden_states[self.late_layers[0] - 1]), self, exits)
