"""Whether drafting pays, by the layers that ran and the tokens that came of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

MEMORY = 0.85
"""What a round counts for, when the next one is."""

FIRST_TRIAL = 6.0
"""Tokens' worth of work before drafting is judged."""

FIRST_PAUSE, LONGEST_PAUSE = 32, 1024
"""Tokens without drafts after a trial that did not pay, and at most, as pauses double."""

CHECK = 0.02
"""Cost of asking an exit, in passes of one token through all layers."""

ROWS = (1, 2, 4, 8)
"""Positions in one pass for which costs are known."""


class Pace:
    """Stops drafting for a while where it costs more than it saves.

    Work is counted in passes of one token through all layers and the head. A pass of several
    positions is cheaper than as many passes, by `row_costs`. Nothing here looks at a clock, so that
    a text is made in the same way each time.

    Args:
        row_costs: Cost of a layer at 1, 2, 4 and 8 positions, that at 1 being 1.
        num_layers: Layers of the model.
    """

    def __init__(self, row_costs: Sequence[float], *, num_layers: int) -> None:
        self._costs = tuple(row_costs)
        self._num_layers = num_layers
        self._work = self._tokens = 0.0
        self._round = 0.0
        self._left = 0
        self._pause = FIRST_PAUSE

    @property
    def drafts(self) -> bool:
        """Whether the next round is to draft."""
        return self._left == 0

    def cost(self, positions: int) -> float:
        """Give the cost of a layer at some positions, between the known ones by a line."""
        known = list(zip(ROWS, self._costs, strict=True))
        for (low, below), (high, above) in itertools.pairwise(known):
            if positions <= high:
                return below + (above - below) * (positions - low) / (high - low)
        (low, below), (high, above) = known[-2:]
        return above + (above - below) * (positions - high) / (high - low)

    def run(self, positions: int, *, batch_size: int = 1) -> None:
        """Count that a layer has run at some positions of each row."""
        work = self.cost(batch_size * positions) / self.cost(batch_size)
        self._round += work / self._num_layers

    def check(self) -> None:
        """Count that an exit was asked."""
        self._round += CHECK

    def end_round(self, tokens: float) -> None:
        """Judge what has been seen.

        Args:
            tokens: Tokens that the round gave a row in the mean.
        """
        if not self.drafts:
            self._left = max(self._left - round(tokens), 0)
            self._work = self._tokens = self._round = 0.0
            return
        self._work = MEMORY * self._work + self._round
        self._tokens = MEMORY * self._tokens + tokens
        self._round = 0.0
        if self._work < min(FIRST_TRIAL, 0.9 / (1 - MEMORY)):
            return
        if self._tokens < self._work:
            self._left = self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            self._work = self._tokens = 0.0
        else:
            self._pause = FIRST_PAUSE
