"""Exits: layers far below the top that predict through a norm and a translator of their own."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from depthmix.method.exit_options import check_exit_layers
from depthmix.method.fingerprint import Fingerprint
from depthmix.method.trained_parts import WideLinear, apply_norm, copy_norm


class Exit(nn.Module):
    r"""One exit: $N_i(h + \mathrm{rms}(h)\, B\, \mathrm{silu}(A\, h / \mathrm{rms}(h)))$.

    A and B make a translator of low rank; B starts at zero, so that a new exit is the pretrained
    final norm at layer i (the logit lens). Its size follows that of the residual stream, which
    grows with depth.

    Args:
        final_norm: The pretrained final norm, copied as the start of the exit's own.
        hidden_size: Width of the residual stream, d.
        rank: Rank of the translator; 0 leaves the norm alone.
    """

    def __init__(self, final_norm: nn.Module, *, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.norm = copy_norm(final_norm).float()
        device = next((p.device for p in self.norm.parameters()), None)
        self.down = self.up = None
        if rank:
            options = {"bias": False, "device": device, "dtype": torch.float32}
            self.down = WideLinear(hidden_size, rank, **options)
            self.up = WideLinear(rank, hidden_size, **options)
            nn.init.normal_(self.down.weight, std=1 / math.sqrt(hidden_size))
            nn.init.zeros_(self.up.weight)

    def forward(
        self, hidden_states: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        """Give what the head takes, in float32.

        Args:
            hidden_states: Residual stream that the exit's layer leaves, `h_i`.
        """
        states = hidden_states.float()
        if self.down is not None and self.up is not None:
            size = states.square().mean(-1, keepdim=True).sqrt()
            within = F.silu(self.down(F.rms_norm(states, states.shape[-1:])))
            states = torch.addcmul(states, size, self.up(within))
        with torch.autocast(states.device.type, enabled=False):
            return apply_norm(self.norm, states).float()


class Exits(nn.Module):
    """Exits of one model. They draft, and are no members of the ensemble.

    Args:
        layers: Numbers of the layers, increasing, each below the final one.
        rank: Rank of each translator; 0 for norms alone.
        final_norm: The pretrained final norm.
        hidden_size: Width of the residual stream, d.
        num_hidden_layers: Layers of the model, n.

    Raises:
        ValueError: If a layer is not between 1 and n - 1, they do not increase, or `rank` is
            negative.
    """

    def __init__(
        self,
        layers: Sequence[int],
        *,
        rank: int,
        final_norm: nn.Module,
        hidden_size: int,
        num_hidden_layers: int,
    ) -> None:
        super().__init__()
        check_exit_layers(layers, num_hidden_layers=num_hidden_layers)
        if rank < 0:
            raise ValueError(
                f"`exit_rank` must be at least 0, got {rank}; 0 gives each exit a norm alone."
            )
        self.layers = tuple(layers)
        self.rank = rank
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.made_for: Fingerprint | None = None  # the finished model that they were put on
        self.sha256: str | None = None  # of their file
        self.by_layer = nn.ModuleDict(
            {str(i): Exit(final_norm, hidden_size=hidden_size, rank=rank) for i in layers}
        )

    def forward(
        self, layer: int, hidden_states: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        """Let the exit at a layer say what the head takes, in float32.

        Args:
            layer: Its number, one of `layers`.
            hidden_states: Residual stream that this layer leaves.
        """
        return self.by_layer[str(layer)](hidden_states)

    def only(self, layers: Sequence[int]) -> Exits:
        """Copy the exits at some of the layers.

        Args:
            layers: Numbers among `layers`, increasing.

        Raises:
            ValueError: If there is no exit at one of them, or they do not increase.
        """
        check_exit_layers(layers, num_hidden_layers=self.num_hidden_layers)
        if not set(layers) <= set(self.layers):
            raise ValueError(
                f"`layers` must be among the exits' own, {list(self.layers)}, got {list(layers)}."
            )
        twin = copy.deepcopy(self)
        for layer in set(self.layers) - set(layers):
            del twin.by_layer[str(layer)]
        twin.layers = tuple(layers)
        return twin
