"""How the report writes scores, losses, leads and p-values."""

from __future__ import annotations

import math
from dataclasses import dataclass

from depthmix.statistics.intervals import Interval


@dataclass(frozen=True, kw_only=True)
class Words:
    """How the numbers of a task are written."""

    is_loss: bool
    """Whether they are losses in nats per token; else shares."""

    @property
    def unit(self) -> str:
        """Of a lead."""
        return "nats" if self.is_loss else "points"

    def mean(self, value: float) -> str:
        """Write a share in percent, 0.071 is 7.1 %, or a loss.

        Args:
            value: The share, or the loss in nats.

        Returns:
            The number with its unit.
        """
        return f"{value:.3f} nats" if self.is_loss else f"{round(100 * value, 1):g} %"

    def ends(self, interval: Interval) -> str:
        """Write an interval.

        Args:
            interval: Of shares or losses.

        Returns:
            Its ends.
        """
        if not self.is_loss:
            return f"{100 * interval.low:.0f}–{100 * interval.high:.0f} %"  # noqa: RUF001
        if math.isinf(interval.low):
            return "unknown"
        return f"{interval.low:.3f}–{interval.high:.3f}"  # noqa: RUF001

    def lead(self, estimate: float, interval: Interval) -> str:
        """Write by how much this run is ahead.

        Args:
            estimate: The other's difference from this run.
            interval: Of that.

        Returns:
            The lead with its interval.
        """
        if self.is_loss:  # the other's loss above this run's is this run's lead
            low, high = interval.low, interval.high
            inner = "unknown" if math.isinf(low) else f"{_signed(low, 3)} to {_signed(high, 3)}"
            return f"{_signed(estimate, 3)} ({inner})"
        low, high = -100 * interval.high, -100 * interval.low
        return f"{_signed(-100 * estimate, 1)} ({_signed(low, 1)} to {_signed(high, 1)})"


def _signed(value: float, digits: int) -> str:
    """Write a difference with a true minus, and zero without a sign."""
    text = f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−")  # noqa: RUF001
    return text.removeprefix("+") if float(text.replace("−", "-")) == 0 else text  # noqa: RUF001


def write_p_value(value: float) -> str:
    """Write a p-value.

    Args:
        value: From 0 to 1.

    Returns:
        The letter, a sign and the number.
    """
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"
