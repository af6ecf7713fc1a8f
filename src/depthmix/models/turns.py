"""Ways to generate that take turns on the same prompts: what each takes, and what is the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor

Way = Callable[[Mapping[str, Tensor]], Int[Tensor, "batch new"]]
"""Generates after `input_ids` and `attention_mask`, padded on the left; gives what is new."""


class Turns:
    """Times ways to generate, batch by batch.

    Which way begins changes from batch to batch. All begin at the same random state, so that
    samples can be the same, too; what is drawn afterwards goes on from the last way's.

    Args:
        ways: One or several by name.
        device: Where the model is.
        ends: Tokens that end a text; what follows them in a row does not count.
    """

    def __init__(
        self, ways: Mapping[str, Way], *, device: torch.device, ends: Collection[int]
    ) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in ways}
        """Wall time of each batch, prompts included."""
        self.num_tokens = dict.fromkeys(ways, 0)
        """New tokens, each text's up to its end."""
        self.num_texts = 0
        self.num_same = 0
        """Texts that were the same in all ways, token by token."""
        self._ways, self._device, self._ends = dict(ways), device, frozenset(ends)
        self._num_batches = 0

    def warm_up(self, inputs: Mapping[str, Tensor], ways: Collection[Way] | None = None) -> None:
        """Generate once without counting.

        Args:
            inputs: As a way takes them.
            ways: What generates, where the ways themselves must not.
        """
        for way in self._ways.values() if ways is None else ways:
            with self._same_randomness():
                way(inputs)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Int[Tensor, "batch _"]]:
        """Generate after a batch of prompts in each way, and count it.

        Args:
            inputs: As a way takes them.

        Returns:
            The new tokens of each row, by way.
        """
        names, turn = sorted(self._ways), self._num_batches % len(self._ways)
        *first, last = [*names[turn:], *names[:turn]]
        found = {}
        for name in first:
            with self._same_randomness():
                found[name] = self._time(name, inputs)
        found[last] = self._time(last, inputs)
        rows = {name: [cut(row, self._ends) for row in found[name].tolist()] for name in found}
        for name, texts in rows.items():
            self.num_tokens[name] += sum(map(len, texts))
        self._num_batches += 1
        self.num_texts += len(found[last])
        self.num_same += sum(
            all(text == texts[0] for text in texts) for texts in zip(*rows.values(), strict=True)
        )
        return found

    def _time(self, name: str, inputs: Mapping[str, Tensor]) -> Int[Tensor, "batch new"]:
        """Generate in one way, and take its time."""
        self._wait()
        start = time.perf_counter()
        tokens = self._ways[name](inputs)
        self._wait()
        self.seconds[name].append(time.perf_counter() - start)
        return tokens

    def _wait(self) -> None:
        """Let the device come to the end of what it was given."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)

    @contextmanager
    def _same_randomness(self) -> Iterator[None]:
        """Let what follows draw what this draws."""
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            yield


def cut(tokens: list[int], ends: Collection[int]) -> list[int]:
    """Cut tokens off behind the first that ends a text."""
    place = next((at for at, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: place + 1]
