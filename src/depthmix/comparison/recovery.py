"""How much of the gap between two methods a third one recovers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from depthmix.statistics.intervals import TINY, Interval, bootstrap_interval, has_spread


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A gap between two methods, and a third that may recover some of it."""

    start: str
    """Label of the method where the gap begins, such as LoRA_¬K."""

    goal: str
    """Label of the method where it ends, such as LoRA_all."""

    method: str
    """Label of the method whose share of the gap is asked for."""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """The share of a gap that a method recovers on a task, or on the average of several."""

    gap: Gap
    """The methods."""

    task: str
    """The task's name, or `average`."""

    width: float
    """Mean score of the goal minus that of the start, between -1 and 1."""

    width_interval: Interval
    """95 % interval of `width`."""

    share: float | None
    """(method - start) / (goal - start): 0 at the start, 1 at the goal, and any number beyond;
    `None` where it is undefined."""

    share_interval: Interval | None
    """95 % interval of `share`, by the same resamples as all other intervals; `None` where it is
    undefined."""

    undefined: str | None
    """Why the share is undefined; `None` where it is not."""


def recover_gap(
    gap: Gap,
    *,
    task: str,
    means: Mapping[str, float],
    resampled: Mapping[str, Float[np.ndarray, " resamples"]],
    num_items: int,
) -> Recovery:
    """Compute the share of a gap that a method recovers, resample by resample.

    The interval takes the central 95 % of (method - start) / (goal - start), each of one resample
    of items and seeds. A resample in which the gap is zero or reversed tells nothing of the share,
    and counts on both sides; there are few, since the share is undefined where the gap's own
    interval holds 0.

    Args:
        gap: The three methods.
        task: Name of the task, for the result.
        means: Mean score of each method, by label.
        resampled: Means over resampled items and seeds, by label; all from the same draws.
        num_items: Items of the task.

    Returns:
        Width of the gap and share, each with its interval.
    """
    width = means[gap.goal] - means[gap.start]
    widths = resampled[gap.goal] - resampled[gap.start]
    gains = resampled[gap.method] - resampled[gap.start]
    interval = bootstrap_interval(widths, width, num_items=num_items, lowest=-1)
    there = np.sign(width) * widths > TINY
    shares = np.divide(gains, widths, out=np.zeros_like(gains), where=there)
    share, share_interval, undefined = None, None, None
    if interval.low <= 0 <= interval.high:
        undefined = "the gap's interval holds 0"
    elif not has_spread(shares):
        undefined = "all resamples give the same share"
    else:
        share = (means[gap.method] - means[gap.start]) / width
        # Rounded inwards: at most as many resamples as lie outside are without a gap.
        low = np.quantile(np.where(there, shares, -np.inf), 0.025, method="higher")
        high = np.quantile(np.where(there, shares, np.inf), 0.975, method="lower")
        share_interval = Interval(float(low), float(high))
    return Recovery(
        gap=gap,
        task=task,
        width=width,
        width_interval=interval,
        share=share,
        share_interval=share_interval,
        undefined=undefined,
    )
