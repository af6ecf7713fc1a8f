"""A decoder's parts, by reference: its layers, its final norm, and its head as a function."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

UNQUANTISED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of a weight that is multiplied as it is."""


@dataclass(frozen=True)
class Backbone:
    """A decoder's parts, by reference; the model stays their owner."""

    layers_name: str
    """Full name of the `ModuleList` of decoder layers."""

    final_norm_name: str
    """Full name of the final norm."""

    num_hidden_layers: int
    """Decoder layers, n."""

    hidden_size: int
    """Width of the residual stream, d."""

    logit_scale: float
    """Factor between the head's product and the logits."""

    soft_cap: float | None
    """c in `c tanh(logits / c)`, or None where logits are not capped."""

    model: PreTrainedModel

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, `L_1 … L_n`."""
        layers = self.model.get_submodule(self.layers_name)
        assert isinstance(layers, nn.ModuleList)
        return layers

    @property
    def final_norm(self) -> nn.Module:
        """What stands where the final norm stood: the norm itself or a mixture."""
        return self.model.get_submodule(self.final_norm_name)

    @property
    def decoder(self) -> nn.Module:
        """The module that runs the layers and then the final norm."""
        return self.model.get_submodule(self.layers_name.rpartition(".")[0])

    @property
    def trunk(self) -> nn.Module:
        """The innermost module that holds both the layers and the final norm."""
        names = zip(self.layers_name.split("."), self.final_norm_name.split("."), strict=False)
        shared = takewhile(lambda pair: pair[0] == pair[1], names)
        return self.model.get_submodule(".".join(name for name, _ in shared))

    @property
    def head(self) -> nn.Module:
        """The model's output matrix, `φ` without what surrounds it."""
        head = self.model.get_output_embeddings()
        assert head is not None  # or `find_backbone` had refused the model
        return head

    @property
    def head_weight(self) -> Tensor:
        """The output matrix's weight, (vocab, hidden)."""
        weight = self.head.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def vocab_size(self) -> int:
        """Tokens that the head predicts; a quantised weight may have another shape."""
        return getattr(self.head, "out_features", self.head_weight.size(0))

    def head_dtype(self, given: torch.dtype) -> torch.dtype:
        """Name the dtype in which the head takes states that are `given` in some dtype.

        That of its weight, or where that is quantised the given one, which the head casts itself.
        """
        own = self.head_weight.dtype
        return own if own in UNQUANTISED else given

    def project(self, normed_states: Float[Tensor, "... hidden"]) -> Float[Tensor, "... vocab"]:
        """Apply the model's head: everything affine between the final norm and the logits.

        Args:
            normed_states: Output of a norm, `N_i(h_i)`.

        Returns:
            Logits before the soft cap, in the head's dtype.
        """
        logits = self.head(self.head_input(normed_states))
        return logits if self.logit_scale == 1 else logits * self.logit_scale

    def head_input(self, normed_states: Float[Tensor, "... hidden"]) -> Float[Tensor, "... width"]:
        """Apply what stands between final norm and head: OPT's `project_out`, or nothing."""
        projection = getattr(self.decoder, "project_out", None)
        return projection(normed_states) if isinstance(projection, nn.Module) else normed_states

    def cap(self, logits: Float[Tensor, "... vocab"]) -> Float[Tensor, "... vocab"]:
        """Apply the model's soft cap, `c tanh(ℓ / c)`, where it has one."""
        if self.soft_cap is None:
            return logits
        return self.soft_cap * torch.tanh(logits / self.soft_cap)

    def unembed(self, normed_states: Float[Tensor, "... hidden"]) -> Float[Tensor, "... vocab"]:
        """Turn a layer's normed states into the logits that it alone would give, `φ(N_i(h_i))`."""
        return self.cap(self.project(normed_states))
