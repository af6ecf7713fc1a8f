"""How sure one may be of a mean score, and of a difference between two methods.

Scores are arrays of one number from 0 to 1 per item (1 for a right answer), in one row per training
seed. Intervals are at 95 %, and tests are two-sided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from scipy import stats

from depthmix.statistics.resampling import average_seeds, resample_items, resample_seeds

TINY = 1e-12
"""Differences of means below this are rounding."""

Scores = np.ndarray | Sequence[Any]
"""Numbers or truth values: one per item, or a row of them per seed."""


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval."""

    low: float
    """Lower end of the interval."""

    high: float
    """Upper end of the interval."""


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """How much one method's mean score exceeds another's on the same items."""

    estimate: float
    """Mean score after minus mean score before, between -1 and 1; of losses, in nats."""

    interval: Interval
    """95 % interval of `estimate`, over other items of the same kind and, with several seeds, other
    seeds."""

    p_value: float
    """Two-sided: chance of so large a difference if neither method were better."""

    test: Literal["mcnemar", "bootstrap"]
    """McNemar's exact test for right and wrong answers of one seed each, else the bootstrap's."""


def wilson_interval(num_correct: int, num_items: int) -> Interval:
    """Compute Wilson's 95 % interval of a share.

    Args:
        num_correct: Items answered rightly.
        num_items: All items, at least one.

    Returns:
        The interval, within 0 and 1.
    """
    ends = stats.binomtest(num_correct, num_items).proportion_ci(method="wilson")
    return Interval(float(ends.low), float(ends.high))


def mcnemar_p_value(before: Scores, after: Scores) -> float:
    """Test by McNemar's exact test whether two methods are right equally often.

    Only items that one of the two answers rightly count; if neither were better, each of them
    would be a fair coin's toss. Two-sided, from the binomial distribution.

    Args:
        before: The first method's answers, 1 for right and 0 for wrong.
        after: The second method's answers to the same items.

    Returns:
        The p-value; 1 if no item changed.
    """
    changes = np.asarray(after, dtype=int) - np.asarray(before, dtype=int)
    gains, losses = int((changes > 0).sum()), int((changes < 0).sum())
    return float(stats.binomtest(gains, gains + losses).pvalue) if gains + losses else 1.0


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Adjust the p-values of a family of tests by Holm's step-down method.

    The smallest p-value is multiplied by the number of tests, the next by one less, and so on; none
    may fall below a smaller one's. The chance that any true null hypothesis falls below 0.05 is
    then at most 0.05, however the tests depend on each other.

    Args:
        p_values: One per test, in any order.

    Returns:
        The adjusted p-values, in the order given.
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return tuple(float(value) for value in adjusted.clip(max=1))


def mean_interval(scores: Scores, *, seed: int = 0, are_losses: bool = False) -> Interval:
    """Compute a 95 % interval of a mean score over other items, and other seeds if there are some.

    Args:
        scores: Items, or seeds × items.
        seed: Of the resamples.
        are_losses: Whether they are losses, of any size.

    Returns:
        Wilson's interval for right and wrong answers of one seed, otherwise the percentiles of the
        bootstrap: over items with one seed, over seeds and items with several. Of losses that are
        all alike, or one, it has no ends.

    Raises:
        ValueError: If there is no score, or one is not between 0 and 1.
    """
    table = _check_scores("scores", scores, are_losses=are_losses)
    rng = np.random.default_rng(seed)
    means = average_seeds(resample_items(table, rng), resample_seeds(len(table), rng))
    return summarise_mean(table, means, are_losses=are_losses)


def summarise_mean(
    scores: Float[np.ndarray, "seeds items"],
    resampled: Float[np.ndarray, " resamples"],
    *,
    are_losses: bool = False,
) -> Interval:
    """Turn scores and their resampled means into an interval, as `mean_interval` does."""
    if are_losses:
        mean = float(scores.mean())
        return bootstrap_interval(resampled, mean, num_items=scores.shape[1], lowest=None)
    if len(scores) == 1 and is_binary(scores):
        return wilson_interval(int(scores.sum()), scores.size)
    return bootstrap_interval(resampled, float(scores.mean()), num_items=scores.shape[1], lowest=0)


def paired_difference(before: Scores, after: Scores, *, seed: int = 0) -> PairedDifference:
    """Compare two methods on the same items.

    The interval is the percentile bootstrap: over items with one seed per method, over seeds and
    items with several.

    Args:
        before: Scores of the first method: items, or seeds × items.
        after: Scores of the second method on the same items in the same order.
        seed: Of the resamples.

    Returns:
        Estimate, 95 % interval and p-value.

    Raises:
        ValueError: If the two have different numbers of items, there is no score, or one is not
            between 0 and 1.
    """
    tables = _check_scores("before", before), _check_scores("after", after)
    num_items = tables[0].shape[1]
    if tables[1].shape[1] != num_items:
        raise ValueError(
            f"`after` must judge the same {num_items} items as `before`, "
            f"got {tables[1].shape[1]}; evaluate both on the same records."
        )
    rng = np.random.default_rng(seed)
    items = resample_items(np.concatenate(tables), rng)
    first, second = np.split(items, [len(tables[0])], axis=1)
    means = average_seeds(second, resample_seeds(second.shape[1], rng))
    means = means - average_seeds(first, resample_seeds(first.shape[1], rng))
    return summarise_difference(*tables, means)


def summarise_difference(
    before: Float[np.ndarray, "seeds_before items"],
    after: Float[np.ndarray, "seeds_after items"],
    resampled: Float[np.ndarray, " resamples"],
    *,
    are_losses: bool = False,
) -> PairedDifference:
    """Turn scores and the resampled differences of their means into estimate, interval and test.

    Args:
        before: Scores of the first method.
        after: Scores of the second method on the same items.
        resampled: Differences of the means, second minus first.
        are_losses: Whether the scores are losses, of any size.

    Returns:
        What `paired_difference` returns.
    """
    # Item by item first: a difference of means that are rounded would be rounded twice.
    estimate, num_items = float((after.mean(0) - before.mean(0)).mean()), before.shape[1]
    single = len(before) == len(after) == 1 and not are_losses
    if single and is_binary(before) and is_binary(after):
        p_value, test = mcnemar_p_value(before[0], after[0]), "mcnemar"
    else:
        p_value, test = bootstrap_p_value(resampled, num_items=num_items), "bootstrap"
    return PairedDifference(
        estimate=estimate,
        interval=bootstrap_interval(
            resampled, estimate, num_items=num_items, lowest=None if are_losses else -1
        ),
        p_value=p_value,
        test=test,
    )


def bootstrap_interval(
    resampled: Float[np.ndarray, " resamples"],
    estimate: float,
    *,
    num_items: int,
    lowest: Literal[-1, 0] | None,
) -> Interval:
    """Take the central 95 % of resampled values.

    Where every item is alike, resampling has no spread and would promise certainty; then the
    interval grants the rest that Wilson's interval allows for unseen items of any other kind.

    Args:
        resampled: Means, or differences of means.
        estimate: The value in the sample itself.
        num_items: Items of the sample.
        lowest: The lowest score that an item could have: 0, or -1 for a difference, where the
            highest is 1; `None` for losses, which have neither.

    Returns:
        The interval.
    """
    if not has_spread(resampled) and lowest is None:
        return Interval(-math.inf, math.inf)
    if not has_spread(resampled):
        assert lowest is not None
        rest = 1 - wilson_interval(num_items, num_items).low
        return Interval((1 - rest) * estimate + rest * lowest, (1 - rest) * estimate + rest)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Interval(float(low), float(high))


def bootstrap_p_value(resampled: Float[np.ndarray, " resamples"], *, num_items: int) -> float:
    """Test by resampled differences whether the difference is zero, two-sided.

    Twice the share of resamples on the smaller side of zero, which counts on both sides itself. It
    is below 0.05 where the interval leaves zero out. No test of n items can promise more than n
    tosses of a coin that all fall alike, so the p-value is at least 2^(1 - n).

    Args:
        resampled: Differences of means.
        num_items: Items of the sample.

    Returns:
        The p-value, at least 2 / (resamples + 1).
    """
    smaller = min((resampled <= TINY).sum(), (resampled >= -TINY).sum())
    p_value = 2 * (int(smaller) + 1) / (len(resampled) + 1)
    return min(1.0, max(p_value, 2.0 ** (1 - num_items)))


def has_spread(resampled: Float[np.ndarray, " resamples"]) -> bool:
    """Tell whether resampled values differ by more than rounding."""
    return bool(np.ptp(resampled) > TINY)


def is_binary(scores: Float[np.ndarray, "*shape"]) -> bool:
    """Tell whether all scores are 0 or 1."""
    return bool(np.isin(scores, (0, 1)).all())


def _check_scores(
    name: str, scores: Scores, *, are_losses: bool = False
) -> Float[np.ndarray, "seeds items"]:
    """Bring scores into rows of seeds, and check that there are some; but losses, from 0 to 1."""
    table = np.atleast_2d(np.asarray(scores, dtype=float))
    if table.ndim != 2 or not table.size:
        raise ValueError(
            f"`{name}` must hold the scores of at least one item, or rows of them, one per seed, "
            f"got an array of shape {np.shape(scores)}."
        )
    if not are_losses and not ((table >= 0) & (table <= 1)).all():
        raise ValueError(
            f"`{name}` must be scores from 0 to 1, got {table.min():g} to {table.max():g}; "
            "divide them by the highest possible score."
        )
    return table
