"""What a token of a text, or a layer's guess in its place, is coloured by in figures of a lens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from depthmix.depth.lens import Lens, Prediction

Quantity = Literal["loss", "entropy", "jsd", "mean_depth", "routing_entropy"]
"""What colours a token of the text."""

Shade = Literal["probability", "entropy", "rank", "kl"]
"""What colours a guess of a layer."""

NAMES: dict[Quantity | Shade, str] = {
    "loss": "loss, nats",
    "entropy": "entropy of the prediction, nats",
    "jsd": "mean JS divergence of the late layers from the ensemble, nats",
    "mean_depth": "mean depth, layers",
    "routing_entropy": "entropy of the routing weights, nats",
    "probability": "probability of the guess",
    "rank": "rank of the true token",
    "kl": "KL divergence to the final layer, nats",
}
"""What stands at the scale of colours."""


def measure_tokens(name: str, lens: Lens, quantity: Quantity) -> list[float | None]:
    """Measure the ensemble's prediction of each token.

    Args:
        name: Name of the model, for errors.
        lens: What is measured.
        quantity: By what: `loss`, `entropy`, `jsd` (mean over the late layers), `mean_depth` or
            `routing_entropy`.

    Returns:
        One value per token, in layers for `mean_depth`, in nats for all else; `None` for the
        first, which nothing predicts.

    Raises:
        ValueError: If the quantity needs a mixture, or late layers, that the lens lacks.
    """
    if quantity == "loss":
        return [None, *lens.ensemble.loss]
    if quantity == "entropy":
        return [None, *lens.ensemble.entropy[:-1]]
    if lens.routing is None:
        raise ValueError(
            f"`quantity` can be {quantity} only for models with a mixture, and {name} has none; "
            "take loss or entropy, or leave that model out."
        )
    if quantity == "mean_depth":
        return [None, *lens.routing.mean_depth[:-1]]
    if quantity == "routing_entropy":
        return [None, *lens.routing.entropy[:-1]]
    late = [p.jsd_to_ensemble for p in lens.layers if p.jsd_to_ensemble is not None]
    if not late:
        raise ValueError(
            f"`quantity` can be jsd only where late layers were read out, and of {name} none was; "
            "add them to `layers` of `look`."
        )
    return [None, *(sum(column) / len(late) for column in zip(*late, strict=True))][:-1]


def measure_guesses(
    prediction: Prediction, shade: Shade, columns: Sequence[int]
) -> list[float | None]:
    """Measure one layer's prediction of tokens, by their place in the text counted from 0.

    Returns:
        One value per token: a share, nats, or a place; `None` for the rank of what comes next.
    """
    measured: Sequence[float] = {
        "probability": [row[0] for row in prediction.top_probabilities],
        "entropy": prediction.entropy,
        "rank": prediction.rank,
        "kl": prediction.kl_to_final,
    }[shade]
    return [float(measured[i - 1]) if i <= len(measured) else None for i in columns]
