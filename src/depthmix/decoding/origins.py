"""Where tokens come from: the exit that drafted each, or the top."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

Proposal = tuple[int | None, int]
"""What a row is expected to choose, `None` for whatever that is, and the exit that drafted it."""


class Origins(BaseStreamer):
    """Notes where each token comes from as soon as the decoding loop has chosen it.

    The loop hands its choices to a streamer. This one stands before the caller's own, which can
    therefore ask for the origin of the token that it is given.

    Args:
        num_rows: Rows of the batch.
        top: Number of the final layer, from which a token comes that no exit drafted.
        endings: Tokens after which a row has ended; what pads it has no origin.
        accepted: Is counted up by the exit of each draft that was chosen.
        streamer: The caller's, which gets everything after this one.
    """

    def __init__(
        self,
        *,
        num_rows: int,
        top: int,
        endings: Collection[int] = (),
        accepted: Counter[int] | None = None,
        streamer: Any = None,
    ) -> None:
        self.layers: list[list[int]] = [[] for _ in range(num_rows)]
        """Row by row, the layer at which each token was drafted, or the top."""
        self._top, self._endings, self._streamer = top, frozenset(endings), streamer
        self._accepted: Counter[int] = Counter() if accepted is None else accepted
        self._expected: deque[Sequence[Proposal | None]] = deque()
        self._has_prompt = False
        self._has_ended = [False] * num_rows

    def expect(self, proposals: Sequence[Proposal | None], *, anew: bool = False) -> None:
        """Say what the loop will choose next if it agrees with the drafts.

        Args:
            proposals: Of each row; `None` where no exit drafted.
            anew: Whether the loop chooses nothing after what it read before, a part of a prompt.
        """
        if anew:
            self._expected.clear()
        self._expected.append(proposals)

    def put(self, value: Int[Tensor, " ..."]) -> None:
        """Take the prompt, then each row's next token."""
        if self._has_prompt:
            pairs = zip(value.flatten().tolist(), self._expected.popleft(), strict=True)
            for row, (token, proposal) in enumerate(pairs):
                self._note(row, token, proposal)
        self._has_prompt = True
        if self._streamer is not None:
            self._streamer.put(value)

    def end(self) -> None:
        """Hand on that the text is at its end."""
        if self._streamer is not None:
            self._streamer.end()

    def _note(self, row: int, token: int, proposal: Proposal | None) -> None:
        """Note where a row's next token comes from."""
        if self._has_ended[row]:
            return
        self._has_ended[row] = token in self._endings
        drafted, layer = proposal or (None, self._top)
        if proposal is None or drafted not in (None, token):
            layer = self._top
        else:
            self._accepted[layer] += 1
        self.layers[row].append(layer)
