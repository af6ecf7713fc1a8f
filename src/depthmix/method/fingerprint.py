"""What a model says after a few fixed tokens, by which it is known again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from depthmix.method.architecture import evaluating
from depthmix.method.backbone import Backbone

NUM_TOKENS = 16
"""Tokens after which a model is asked."""

NUM_COMPARED = 4
"""Token ids whose logits are kept after each of them."""

TOLERANCE = 0.1
"""Difference up to which two models count as one. On SmolLM2-135M tuned by LoRA, merging makes
0.000, bfloat16 and rounding to 8 bits 0.04; another run on the same task is 0.16 away, the model
under the adapter 0.37, and a run on another task 0.74. So is rounding to 4 bits there, 0.63: what
such a model says is another thing."""


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What a model says after a few fixed tokens: logits of a few others.

    It survives what changes a model's numbers and not what it says: a merged adapter, another
    device or type, an embedding with more rows.
    """

    input_ids: tuple[int, ...]
    """Tokens after each of which the model is asked, spread over its vocabulary."""

    compared_ids: tuple[int, ...]
    """Tokens whose logits are kept."""

    logits: tuple[float, ...]
    """Those after the first token, then those after the second, and so on; the mean of each
    token's is 0."""

    def __post_init__(self) -> None:
        ids = (*self.input_ids, *self.compared_ids)
        numbers = all(isinstance(one, float | int) and math.isfinite(one) for one in self.logits)
        whole = all(type(one) is int and one >= 0 for one in ids)
        expected = len(self.input_ids) * len(self.compared_ids)
        if not whole or not numbers or not 0 < expected == len(self.logits):
            raise ValueError("A fingerprint must hold token ids, and a logit for each pair.")

    @classmethod
    def take(cls, backbone: Backbone) -> Fingerprint | None:
        """Ask a model, in one pass, which leaves it as it is.

        Args:
            backbone: Its parts; its adapter and its mixture take part.

        Returns:
            What it says; `None` where that is not finite.
        """
        size = backbone.vocab_size
        input_ids = _spread(NUM_TOKENS, size)
        compared_ids = _spread(NUM_COMPARED, size)
        found = _ask(backbone, input_ids, compared_ids)
        if not bool(found.isfinite().all()):
            return None
        logits = tuple(float(f"{one:.4g}") for one in found.flatten().tolist())
        return cls(input_ids=input_ids, compared_ids=compared_ids, logits=logits)

    @classmethod
    def from_dict(cls, values: Any) -> Fingerprint:
        """Read what `to_dict` gave.

        Raises:
            ValueError: If it is no fingerprint.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"A fingerprint must hold named values, got {values!r}.")
        try:
            return cls(**{name: tuple(value) for name, value in values.items()})
        except TypeError as error:
            raise ValueError(f"A fingerprint cannot be read ({error}).") from error

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON has them."""
        return {name: list(value) for name, value in asdict(self).items()}

    def difference(self, backbone: Backbone) -> float:
        r"""Measure how far a model is from the one that this was taken of.

        Computes $\lVert\ell - \ell'\rVert / \lVert\ell\rVert$ over all logits that are kept.

        Args:
            backbone: The model's parts.

        Returns:
            0 for the same model, about 1 for one that has nothing to do with it; infinite where it
            lacks a token, or what it says is not finite.
        """
        if max(*self.input_ids, *self.compared_ids) >= backbone.vocab_size:
            return math.inf
        kept = torch.tensor(self.logits, dtype=torch.float64)
        found = _ask(backbone, self.input_ids, self.compared_ids).flatten()
        distance, size = float((found - kept).norm()), float(kept.norm())
        if not math.isfinite(distance):
            return math.inf
        return distance / size if size else distance


def _spread(number: int, size: int) -> tuple[int, ...]:
    """Spread token ids evenly over a vocabulary, neither its first nor its last among them."""
    return tuple(size * place // (number + 1) for place in range(1, number + 1))


@torch.no_grad()
def _ask(
    backbone: Backbone, input_ids: Sequence[int], compared_ids: Sequence[int]
) -> Float[Tensor, "tokens compared"]:
    """Give a model's logits of some tokens after each of others, less their mean, on the CPU."""
    model = backbone.model
    asked: Int[Tensor, "1 tokens"] = torch.tensor([list(input_ids)], device=model.device)
    with evaluating(model):
        output = model(input_ids=asked, use_cache=False)
    logits = output.logits[0, :, list(compared_ids)].double().cpu()
    return logits - logits.mean(-1, keepdim=True)
