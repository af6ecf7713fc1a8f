"""How many of some texts may differ before a share that was asked for is in doubt."""

from __future__ import annotations

import math


def binomial_tail(num_events: int, num_trials: int, chance: float) -> float:
    r"""Compute $P(X \le k)$ for $X$ binomial of n trials, exactly.

    Args:
        num_events: k.
        num_trials: n.
        chance: Chance of each, from 0 to 1.

    Returns:
        The probability.
    """
    if chance <= 0 or num_events >= num_trials:
        return 1.0
    if chance >= 1:
        return 0.0
    terms = (
        math.lgamma(num_trials + 1)
        - math.lgamma(k + 1)
        - math.lgamma(num_trials - k + 1)
        + k * math.log(chance)
        + (num_trials - k) * math.log1p(-chance)
        for k in range(num_events + 1)
    )
    return min(math.fsum(map(math.exp, terms)), 1.0)


def highest_share(num_events: int, num_trials: int, *, error: float = 0.05) -> float:
    """Bound a share from above by Clopper and Pearson, one-sided.

    Args:
        num_events: Trials in which it happened.
        num_trials: All trials.
        error: Chance that the share is higher than the bound.

    Returns:
        The largest share at which so few events still have the chance `error`; 1 if there are no
        trials.
    """
    if num_events >= num_trials:
        return 1.0
    low, high = num_events / num_trials, 1.0
    for _ in range(60):  # the tail falls as the share grows
        middle = (low + high) / 2
        if binomial_tail(num_events, num_trials, middle) > error:
            low = middle
        else:
            high = middle
    return high


def fewest_trials(share: float, *, error: float = 0.05) -> int:
    """Count the trials without an event after which a share is certain enough to be lower.

    Args:
        share: Above 0 and below 1.
        error: Chance of being wrong.

    Returns:
        The smallest n with `(1 - share)^n` at most `error`.
    """
    return math.ceil(math.log(error) / math.log1p(-share) - 1e-9)
