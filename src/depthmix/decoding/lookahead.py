"""What a model has processed ahead of the decoding loop, row by row."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


@dataclass(frozen=True, kw_only=True)
class Guess:
    """A token that the loop has yet to choose, and the prediction after it."""

    token: int

    logits: Float[Tensor, " vocab"]
    """The model's, given this token and all before it."""

    exit: int | None
    """Layer of the exit that drafted the token; `None` where the model itself chose it."""


class Lookahead:
    """Each row's guesses, which the cache holds already, and what it holds by mistake.

    Rows may be ahead by different numbers of tokens. In the cache each of them ends at the right,
    and what is free at the left of the shorter ones is masked, like the padding of prompts.

    Args:
        cache: Keys and values of the tokens so far, the same number in each row.
        batch_size: Rows.
        num_new_tokens: Tokens that the loop will choose at most.
    """

    def __init__(self, cache: DynamicCache, *, batch_size: int, num_new_tokens: int) -> None:
        self.cache = cache
        self.num_chosen = cache.get_seq_length()
        """Tokens of each row that the loop has chosen and handed over, the prompt's among them."""
        self.lengths = [self.num_chosen] * batch_size
        """Tokens of each row that the cache holds, the loop's and guessed ones."""
        self._num_new = num_new_tokens
        self._num_left = num_new_tokens  # to process from here on, the loop's newest one included
        self._guesses: list[deque[Guess]] = [deque() for _ in range(batch_size)]
        self._surplus = [0] * batch_size  # wrong tokens at each row's end of the cache

    def confirm_prompt(self, *, is_whole: bool) -> None:
        """Count what the cache holds as chosen, after a prompt or a part of one."""
        self.num_chosen = self.cache.get_seq_length()
        self.lengths = [self.num_chosen] * len(self.lengths)
        self._num_left = self._num_new - int(is_whole)

    def take(self, tokens: Sequence[int]) -> list[Guess | None]:
        """Compare what the loop has chosen with each row's next guess.

        Args:
            tokens: The next token of each row.

        Returns:
            The guess where it is right; `None` where it is wrong, and all after it are forgotten.
        """
        self.num_chosen += 1
        self._num_left -= 1
        right: list[Guess | None] = []
        for row, token in enumerate(tokens):
            guesses = self._guesses[row]
            if guesses and guesses[0].token == token:
                right.append(guesses.popleft())
            else:
                self.forget(row)
                right.append(None)
        return right

    @property
    def offsets(self) -> list[int]:
        """How far each row's next token to process is from the loop's newest one."""
        return [length - self.num_chosen + 1 for length in self.lengths]

    def is_level(self) -> bool:
        """Take wrong tokens out of the cache, and tell whether it holds what the loop has chosen.

        That is so where no row is ahead: the loop's newest tokens are still to be processed.
        """
        if any(offset != 0 for offset in self.offsets):
            return False
        self.align()
        return True

    @property
    def room(self) -> list[int]:
        """Tokens that each row may still process for a purpose: the loop's last one has none."""
        left = self._num_left + 1  # from the loop's newest token on
        return [max(left - offset, int(offset == 0)) for offset in self.offsets]

    def forget(self, row: int) -> None:
        """Let go of all of a row's guesses."""
        self._surplus[row] += len(self._guesses[row])
        self.lengths[row] -= len(self._guesses[row])
        self._guesses[row].clear()

    def add(self, row: int, guesses: Sequence[Guess], *, num_processed: int) -> None:
        """Keep guesses, the first of a row's newly processed tokens; the others are wrong."""
        self._guesses[row].extend(guesses)
        self.lengths[row] += len(guesses)
        self._surplus[row] += num_processed - len(guesses)

    def pop(self, row: int) -> Guess:
        """Hand over a row's next guess."""
        return self._guesses[row].popleft()

    def draft(self, row: int) -> tuple[int, int] | None:
        """Tell a row's next token and the exit that drafted it; `None` where none did."""
        guesses = self._guesses[row]
        exit_layer = guesses[0].exit if guesses else None
        return None if exit_layer is None else (guesses[0].token, exit_layer)

    def align(self) -> None:
        """Take wrong tokens out of the cache, so that each row ends at the right."""
        reach = max(len(guesses) for guesses in self._guesses)  # how far a row may have to go back
        align_cache(self.cache, self._surplus, length=max(self.lengths), reach=reach)
        self._surplus = [0] * len(self._surplus)

    def withdraw(self) -> None:
        """Let go of all guesses, so that the cache holds what the loop has handed over."""
        for row in range(len(self.lengths)):
            self.forget(row)
        self.align()

    def padding(
        self, attention_mask: Int[Tensor, "batch seq"] | None, *, num_new: int, device: torch.device
    ) -> Int[Tensor, "batch columns"] | None:
        """Say where the cache's rows, and tokens that will follow, are to be seen.

        Args:
            attention_mask: The loop's mask; what lies beyond it is seen.
            num_new: Tokens of each row that will follow.
            device: Where the mask is wanted.

        Returns:
            1 for a token and 0 for what is free or padding, or `None` where all is seen.
        """
        if attention_mask is None and len(set(self.lengths)) == 1:
            return None
        longest = max(self.lengths)
        free = longest - torch.tensor(self.lengths, device=device)
        column = torch.arange(longest + num_new, device=device) - free[:, None]  # (B, columns)
        seen = (column >= 0).long()
        if attention_mask is not None:
            beyond = seen.new_ones(len(seen), max(seen.shape[1] - attention_mask.shape[1], 0))
            own = torch.cat([attention_mask.to(seen), beyond], dim=1)
            seen = seen * own.take_along_dim(column.clamp(min=0), dim=1)
        return seen


def align_cache(
    cache: DynamicCache, surplus: Sequence[int], *, length: int, reach: int = 0
) -> None:
    """Take tokens from the end of each row of a cache, and let rows end at the right again.

    Sliding layers must record the past, or they lack what moves into the window again.

    Args:
        cache: Keys and values. Of a row that is shorter than `length`, what stands before its
            beginning has no meaning.
        surplus: Tokens to take from each row.
        length: Tokens that the cache holds afterwards.
        reach: Tokens that a later call may take; a sliding layer keeps as many beyond its window.
    """
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)  # other caches are refused
        if layer.keys is None or layer.values is None:  # nothing there yet
            continue
        width = length
        if isinstance(layer, DynamicSlidingWindowLayer):
            width = min(length, layer.sliding_window - 1 + reach)
            layer.cumulative_length = length
        layer.keys = _end_earlier(layer.keys, surplus, width)
        layer.values = _end_earlier(layer.values, surplus, width)


def _end_earlier(
    states: Float[Tensor, "batch heads seq head_dim"], surplus: Sequence[int], width: int
) -> Float[Tensor, "batch heads width head_dim"]:
    """Keep `width` states of each row, without the last `surplus` ones."""
    starts = [states.shape[2] - tokens - width for tokens in surplus]
    if len(set(starts)) == 1:
        return states[:, :, starts[0] : starts[0] + width]
    first = torch.tensor(starts, device=states.device)[:, None]
    index = (first + torch.arange(width, device=states.device)).clamp(min=0)  # (B, width)
    return states.take_along_dim(index[:, None, :, None], dim=2)
