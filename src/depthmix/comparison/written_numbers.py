"""Shares, losses, their intervals and p-values as a table writes them."""

from __future__ import annotations

import math

from depthmix.statistics.intervals import Interval


def write_percent(share: float, sign: str = "") -> str:
    """Write a share in percent, and zero without a minus."""
    return f"{round(100 * share, 1) + 0.0:{sign}.1f}"


def write_ends(interval: Interval, sign: str = "") -> str:
    """Write an interval in percent."""
    return f"{write_percent(interval.low, sign)} to {write_percent(interval.high, sign)}"


def write_nats(loss: float, sign: str = "") -> str:
    """Write a loss in nats, and zero without a minus."""
    return f"{round(loss, 3) + 0.0:{sign}.3f}"


def write_ends_in_nats(interval: Interval, sign: str = "") -> str:
    """Write an interval of losses; one record has none."""
    if math.isinf(interval.low):
        return "unknown"
    return f"{write_nats(interval.low, sign)} to {write_nats(interval.high, sign)}"


def write_p_value(p_value: float) -> str:
    """Write a p-value to three digits after the point."""
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"
