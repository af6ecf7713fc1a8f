"""Bootstrap resamples of items and training seeds.

Items and seeds are crossed: every seed answers the same items. A resample therefore draws items
once, for all seeds and all methods, which keeps comparisons paired; seeds it draws for each method
by itself, because equal seed numbers of two methods have nothing in common. Rows that are read from
the same runs, such as two layers, share their draw of seeds.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

NUM_RESAMPLES = 9999
"""Resamples of every bootstrap; one less than a round number, since p-values add one."""

DRAWS_PER_BLOCK = 2**22
"""Counts that a bootstrap holds at once (32 MiB)."""


def resample_items(
    scores: Float[np.ndarray, "rows items"], rng: np.random.Generator
) -> Float[np.ndarray, "resamples rows"]:
    """Draw as many items as there are, with replacement, and average every row over them.

    In distribution equal to `scores[:, rng.integers(n, size=n)].mean(1)` once per resample. Items
    with the same scores in all rows are interchangeable, so that only the number of items drawn
    from each such group matters, and these numbers are multinomial.

    Args:
        scores: One row per method and seed.
        rng: Source of the draws.

    Returns:
        The mean of each row in each of `NUM_RESAMPLES` resamples.
    """
    patterns, counts = np.unique(scores, axis=1, return_counts=True)
    num_items, share = scores.shape[1], counts / scores.shape[1]
    block = max(1, DRAWS_PER_BLOCK // len(counts))
    sizes = [min(block, NUM_RESAMPLES - start) for start in range(0, NUM_RESAMPLES, block)]
    return np.concatenate(
        [rng.multinomial(num_items, share, size=size) @ patterns.T / num_items for size in sizes]
    )


def resample_seeds(
    num_seeds: int, rng: np.random.Generator
) -> Float[np.ndarray, "resamples seeds"]:
    """Draw seeds with replacement, one fewer than there are, and give each one's weight.

    One fewer, because means of S draws from S seeds vary too little, by the factor (S - 1) / S;
    means of S - 1 draws have the variance s² / S that a mean over S seeds has (Rao and Wu, 1988).
    A single seed cannot be resampled and keeps its weight of one.

    Args:
        num_seeds: Seeds of one method.
        rng: Source of the draws.

    Returns:
        The weights of the seeds in each of `NUM_RESAMPLES` resamples; each row sums to one.
    """
    num_draws = max(1, num_seeds - 1)
    share = np.full(num_seeds, 1 / num_seeds)
    return rng.multinomial(num_draws, share, size=NUM_RESAMPLES) / num_draws


def average_seeds(
    means: Float[np.ndarray, "resamples seeds"], weights: Float[np.ndarray, "resamples seeds"]
) -> Float[np.ndarray, " resamples"]:
    """Average one method's resampled means over its resampled seeds."""
    return (means * weights).sum(axis=1)
