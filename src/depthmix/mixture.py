"""The mixture of depths: late norms, router, and the module that stands for the final norm."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.hooks import remove_hook_from_module
from jaxtyping import Float
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn

from depthmix.backbone import Backbone
from depthmix.capture import HiddenStateCapture
from depthmix.config import MixtureConfig

ROUTER_STD = 0.02
"""Standard deviation of the router's Gaussian start (paper)."""

IDENTITY_SHARE = 0.99
"""Routing weight of the final layer at the router's identity start."""


@dataclass(frozen=True)
class Routes:
    """The predictions of one forward pass, before they are mixed."""

    states: tuple[Float[Tensor, "batch seq hidden"], ...]
    """Normed states `N_i(h_i)`, one per late layer, earliest first."""

    weights: Float[Tensor, "batch seq routes"]
    """Routing weights `G`, float32, summing to one over the routes."""

    mixture: Mixture
    """The mixture that made them."""


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
    """The trainable part of MoDE: one norm per late layer and a router.

    Args:
        config: The mixture's options.
        final_norm: The pretrained final norm `N_p`, copied as the start of each late norm.
        late_layers: Layers of the ensemble, increasing; the last one is the final layer.
        hidden_size: Width of the residual stream, d.
    """

    norms: nn.ModuleDict
    router: nn.Linear

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
        self.late_layers = late_layers
        own = list(late_layers[:-1]) if config.train_late_norms else []
        own += [late_layers[-1]] if config.train_final_norm else []
        self.norms = nn.ModuleDict({str(layer): _copy_norm(final_norm) for layer in own})
        num_routes, identity = len(late_layers), config.router_init == "identity"
        self.router = nn.Linear(hidden_size, num_routes, bias=identity)
        with torch.no_grad():
            if identity:
                rest = (1 - IDENTITY_SHARE) / max(num_routes - 1, 1)
                self.router.weight.zero_()
                self.router.bias.zero_()
                self.router.bias[-1] = config.router_temperature * math.log(IDENTITY_SHARE / rest)
            else:
                self.router.weight.normal_(std=ROUTER_STD)

    @property
    def depths(self) -> tuple[int, ...]:
        """Depths whose residual streams the mixture reads below the final layer's."""
        return (self.late_layers[0] - 1, *self.late_layers[:-1])

    def weigh(
        self, router_input: Float[Tensor, "batch seq hidden"]
    ) -> Float[Tensor, "batch seq routes"]:
        """Route each token, `G(h_{n-k})`, in float32 whatever the trunk's dtype or autocast.

        Args:
            router_input: Residual stream below the first late layer.

        Returns:
            Routing weights, float32, summing to one over the routes.
        """
        with torch.autocast(router_input.device.type, enabled=False):
            x = router_input.float()
            if self.config.router_input == "normed":
                x = F.rms_norm(x, x.shape[-1:])
            bias = None if self.router.bias is None else self.router.bias.float()
            logits = F.linear(x, self.router.weight.float(), bias)
            return route(
                logits, top_k=self.config.top_k, temperature=self.config.router_temperature
            )

    def norm(
        self,
        layer: int,
        hidden_states: Float[Tensor, "batch seq hidden"],
        final_norm: nn.Module,
    ) -> Float[Tensor, "batch seq hidden"]:
        """Apply the norm of a late layer, `N_i(h_i)`; `final_norm` serves where it has none."""
        if str(layer) not in self.norms:
            return final_norm(hidden_states)
        norm = self.norms[str(layer)]
        parameter = next(norm.parameters(), None)
        # A trained norm may be float32 over a bfloat16 trunk, which LayerNorm kernels refuse.
        return norm(hidden_states if parameter is None else hidden_states.to(parameter.dtype))

    def forward(
        self, hidden_states: Mapping[int, Float[Tensor, "batch seq hidden"]], final_norm: nn.Module
    ) -> Routes:
        """Norm the late hidden states and route each token.

        Args:
            hidden_states: Residual streams by layer: each late layer's, and the one below them.
            final_norm: The pretrained final norm `N_p`.

        Returns:
            The normed states and routing weights, not yet mixed.
        """
        states = tuple(
            self.norm(layer, hidden_states[layer], final_norm) for layer in self.late_layers
        )
        return Routes(states, self.weigh(hidden_states[self.late_layers[0] - 1]), self)


class MixtureNorm(nn.Module, ABC):
    """Stands where the model's final norm stood, and returns the mixture `Σ G_i N_i(h_i)`.

    Everything behind the final norm (head, loss, `generate`, cache) stays as it is. Subclasses
    say which mixtures there are and which one is active.

    Args:
        backbone: The model's parts; its final norm `N_p` is kept as `base_layer`.
    """

    base_layer: nn.Module

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.base_layer = backbone.final_norm
        self.backbone = backbone
        self.capture = HiddenStateCapture()
        self.listener: Callable[[Routes], None] | None = None
        self.objective: Any = None

    @property
    @abstractmethod
    def active_mixture(self) -> Mixture | None:
        """The mixture that predicts now, or None for the base model."""

    def watch(self, mixtures: Iterable[Mixture]) -> None:
        """Capture the hidden states that these mixtures read, and no others from now on."""
        depths = {depth for mixture in mixtures for depth in mixture.depths}
        self.capture.watch(self.backbone.layers, depths)

    @property
    def forward(self) -> Callable[..., Tensor]:
        """The forward pass, as a property.

        Liger-Kernel patches whatever stands at the final norm's place by writing `forward` into
        its `__dict__`. A property wins over that; a plain method would be bypassed in silence.
        """
        return self.__dict__.get("_replaced_forward", self._mix)

    @forward.setter
    def forward(self, function: Callable[..., Tensor]) -> None:
        """Let accelerate wrap the forward pass, which it does by assignment."""
        self.__dict__["_replaced_forward"] = function

    @forward.deleter
    def forward(self) -> None:
        self.__dict__.pop("_replaced_forward", None)

    def _mix(
        self, hidden_states: Float[Tensor, "batch seq hidden"]
    ) -> Float[Tensor, "batch seq hidden"]:
        captured = self.capture.take()
        mixture = self.active_mixture
        if mixture is None:
            return self.base_layer(hidden_states)
        # Layers may sit on several devices; the mixture lives beside the final norm.
        captured = {
            depth: captured[depth].to(hidden_states.device)
            for depth in mixture.depths
            if depth in captured
        }
        if len(captured) < len(mixture.depths):
            return self._exit_early(mixture, hidden_states, num_captured=len(captured))
        routes = mixture({**captured, mixture.late_layers[-1]: hidden_states}, self.base_layer)
        if self.listener is not None:
            self.listener(routes)
        final_is_pretrained = str(mixture.late_layers[-1]) not in mixture.norms
        dtype = routes.states[-1].dtype if final_is_pretrained else self._dtype(hidden_states)
        return mix(routes.states, routes.weights).to(dtype)

    def _exit_early(
        self,
        mixture: Mixture,
        hidden_states: Float[Tensor, "batch seq hidden"],
        *,
        num_captured: int,
    ) -> Float[Tensor, "batch seq hidden"]:
        """Answer for a pass that stopped early with the norm of the layer it stopped at.

        `generate(assistant_early_exit=…)` drafts by truncating the layer loop. The depths seen
        tell where it stopped: the residual stream that arrives is the next late layer's.
        """
        if self.training:
            raise RuntimeError(
                f"Only {num_captured} of the {len(mixture.depths)} hidden states of the mixture "
                "were seen; all layers must run in training, in one process and thread."
            )
        if num_captured == 0:
            return self.base_layer(hidden_states)
        layer = mixture.late_layers[num_captured - 1]
        normed = mixture.norm(layer, hidden_states, self.base_layer)
        return normed.to(self._dtype(hidden_states))

    def _dtype(self, hidden_states: Tensor) -> torch.dtype:
        """Dtype that the base norm would return, found on no tokens at all."""
        return self.base_layer(hidden_states[:, :0]).dtype


class MoDENorm(MixtureNorm):
    """A mixture in place of the final norm, without PEFT.

    Args:
        backbone: The model's parts.
        mixture: The mixture that predicts.
    """

    def __init__(self, backbone: Backbone, mixture: Mixture) -> None:
        super().__init__(backbone)
        self.mixture = mixture
        self.watch([mixture])

    @property
    def active_mixture(self) -> Mixture:
        """The one mixture."""
        return self.mixture


def _copy_norm(final_norm: nn.Module) -> nn.Module:
    """Copy a pretrained norm: its values as the start, none of its hooks, ready to train."""
    with gather_params_ctx(list(final_norm.parameters())):
        norm = copy.deepcopy(final_norm)
    return remove_hook_from_module(norm, recurse=True).requires_grad_(True)
