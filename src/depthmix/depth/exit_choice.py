"""Which exits bring most for their depth."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from depthmix.depth.exit_readings import ExitReadings

CONFIDENCE = 0.8
"""Confidence from which a token is taken to leave at an exit. Calibration finds better ones."""

EXIT_COST = 0.25
"""What asking one exit costs, in layers: its translator, and the head on a part of the
vocabulary."""

CATCH_UP = 0.3
"""What a deferred layer costs in the pass that catches up, in layers: it takes several tokens at
once, each of which costs about this share of one by itself on two CPU cores."""

MOST_EXITS = 3
"""Exits that are kept at most."""


@dataclass(frozen=True, kw_only=True)
class ExitChoice:
    """Exits that bring most for their depth."""

    layers: tuple[int, ...]
    """Numbers of their layers, increasing."""

    expected_layers: float
    """What a token costs with them, in layers; without exits it is `num_hidden_layers`."""


def candidate_layers(num_hidden_layers: int) -> tuple[int, ...]:
    """List layers at which exits are tried: each eighth of the depth, from a quarter of it up.

    Args:
        num_hidden_layers: Layers of the model, n.

    Returns:
        Numbers from 1 to n - 1, increasing.

    Raises:
        ValueError: If the model has one layer alone.
    """
    if num_hidden_layers < 2:
        raise ValueError(
            f"`model` must have at least 2 layers, so that an exit lies below the final one, got "
            f"{num_hidden_layers}; exits bring nothing to this one."
        )
    layers = {round(eighth * num_hidden_layers / 8) for eighth in range(2, 8)}
    return tuple(sorted(layer for layer in layers if 1 <= layer < num_hidden_layers))


def spread_layers(num_hidden_layers: int) -> tuple[int, ...]:
    """List layers for exits among which calibration is to choose.

    Those that bring most lie far apart below, and close together where predictions settle: each
    twelfth of the depth from a sixth of it up to two thirds, then each thirtieth up to nine tenths.

    Args:
        num_hidden_layers: Layers of the model, n.

    Returns:
        Numbers from 1 to n - 1, increasing; 14 of 30 layers, and never more.

    Raises:
        ValueError: If the model has one layer alone.
    """
    tried = candidate_layers(num_hidden_layers)
    shares = [twelfth / 12 for twelfth in range(2, 9)] + [part / 30 for part in range(21, 28)]
    layers = {round(share * num_hidden_layers) for share in shares}
    return tuple(sorted(layer for layer in layers if 1 <= layer < num_hidden_layers)) or tried


def cost_of_exits(
    readings: ExitReadings,
    layers: tuple[int, ...],
    *,
    num_hidden_layers: int,
    confidence: float = CONFIDENCE,
) -> Float[Tensor, " tokens"]:
    r"""Say what each token costs if it leaves at its first confident exit, in layers.

    A token that leaves at the j-th exit, at layer l, costs $l + e\,j + c\,(n - l)$, where e is
    `EXIT_COST` and c is `CATCH_UP`: what lies above is deferred and then run beside others. It
    costs n more if the model itself says another token, since what was built on it is thrown away.
    One of which no exit is sure costs n, and e for each exit that was asked.

    Args:
        readings: What exits predict on some tokens.
        layers: Exits that are used, increasing, among those that were read.
        num_hidden_layers: Layers of the model, n.
        confidence: Probability of the likeliest token from which an exit is sure.

    Returns:
        Layers for each token.
    """
    places = [readings.layers.index(layer) for layer in layers]
    n = num_hidden_layers
    right = readings.agreements[:, places]
    sure = readings.confidences[:, places] >= confidence
    asked = torch.arange(1, len(layers) + 1)
    depths = torch.tensor(layers)
    leaving = depths + EXIT_COST * asked + CATCH_UP * (n - depths) + n * (~right).float()
    cost = torch.full((len(sure),), n + EXIT_COST * len(layers))
    for place in reversed(range(len(layers))):  # the first confident one is written last
        cost = torch.where(sure[:, place], leaving[:, place], cost)
    return cost


def choose_exits(
    readings: ExitReadings,
    *,
    num_hidden_layers: int,
    confidence: float = CONFIDENCE,
    most: int = MOST_EXITS,
) -> ExitChoice:
    """Choose the exits with which a token costs least on average, by `cost_of_exits`.

    All sets of at most `most` exits are tried; of several that cost the same the smallest is taken,
    and of these the lowest.

    Args:
        readings: What the candidates predict on held-out tokens.
        num_hidden_layers: Layers of the model, n.
        confidence: Probability of the likeliest token from which an exit is sure.
        most: Exits to keep at most, at least 1.

    Returns:
        The exits, at least one, and what a token costs with them.

    Raises:
        ValueError: If `most` is below 1.
    """
    if most < 1:
        raise ValueError(f"`most` must be at least 1, got {most}; without exits nothing drafts.")
    sets = (
        layers
        for size in range(1, min(most, len(readings.layers)) + 1)
        for layers in combinations(readings.layers, size)
    )
    options = {"num_hidden_layers": num_hidden_layers, "confidence": confidence}
    costs = {
        layers: float(cost_of_exits(readings, layers, **options).double().mean()) for layers in sets
    }
    best = min(costs, key=lambda layers: (costs[layers], len(layers), layers))
    return ExitChoice(layers=best, expected_layers=costs[best])
