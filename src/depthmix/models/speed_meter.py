"""What fast generation takes for a user's own prompts, beside dense generation if that is asked."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from depthmix.decoding.fast_generation import FastGeneration
from depthmix.models.continuation import continue_tokens


@dataclass(frozen=True, kw_only=True)
class FastSpeed:
    """What fast generation took; `str` says it in a line."""

    num_texts: int
    """Texts that were generated."""

    num_tokens: int
    """Their new tokens, each text's up to its end."""

    seconds: float
    """Wall time, prompts included."""

    num_hidden_layers: int
    """Layers that dense generation runs for a token."""

    layers_per_token: float
    """Layers that ran for the mean token."""

    drafted: float
    """Share of the tokens that exits drafted, 0 to 1."""

    acceptance: float | None
    """Share of the drafts that are among the tokens; `None` where nothing was drafted."""

    stays_dense: bool
    """Whether the plan says that drafting is not worth it, so that this was the model's own
    `generate`."""

    dense_seconds: float | None
    """Wall time of the same prompts by the model's own `generate`; `None` unless it was asked."""

    num_dense_tokens: int | None
    """Its new tokens."""

    num_same: int | None
    """Texts that were the same in both ways, token by token."""

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second, of all rows together."""
        return self.num_tokens / self.seconds

    @property
    def speed_up(self) -> float | None:
        """Dense generation's time over this one's; `None` unless it was asked."""
        return None if self.dense_seconds is None else self.dense_seconds / self.seconds

    def __str__(self) -> str:
        return " ".join(self._describe())

    def _describe(self) -> Iterator[str]:
        """Say in words what was measured."""
        pace = f"{self.tokens_per_second:.1f} tokens/s"
        if self.stays_dense:
            yield f"Dense, as the plan says that drafting is not worth it here: {pace}."
        else:
            right = "nothing was drafted"
            if self.acceptance is not None:
                right = f"{self.drafted:.0%} of the tokens drafted"
                right += f", {self.acceptance:.0%} of the drafts accepted"
            layers = f"{self.layers_per_token:.1f} of {self.num_hidden_layers} layers a token"
            yield f"Fast: {pace}, {layers}, {right}."
        if self.dense_seconds is None or self.stays_dense:
            return
        assert self.num_dense_tokens is not None  # measured together
        own = f"{self.num_dense_tokens / self.dense_seconds:.1f} tokens/s"
        if self.num_same == self.num_texts:
            same = "the text is the same" if self.num_texts == 1 else "all texts are the same"
        else:
            same = f"{self.num_same} of {self.num_texts} texts are the same"
        yield f"{self.speed_up:.2f} times as fast as dense generation ({own}); {same}."


class SpeedMeter:
    """Generates fast, and counts tokens, seconds and layers.

    Against dense generation, each batch is generated in both ways, which take turns in beginning,
    from the same random state, so that samples can be the same, too; and the first one once before,
    to warm up. What is handed back is fast generation's.

    Args:
        fast: What generates.
        tokenizer: The model's tokenizer.
        settings: Keyword arguments of `GenerationConfig`.
        against_dense: Whether dense generation is measured, too.
    """

    def __init__(
        self,
        fast: FastGeneration,
        tokenizer: PreTrainedTokenizerBase,
        settings: Mapping[str, Any],
        *,
        against_dense: bool = False,
    ) -> None:
        self.fast, self.against_dense = fast, against_dense and not fast.plan.stay_dense
        self.model: PreTrainedModel | PeftModel = fast.model
        self._tokenizer, self._settings = tokenizer, settings
        ends = settings.get("eos_token_id", fast.model.generation_config.eos_token_id)
        self._ends = {ends} if isinstance(ends, int) else set(ends or ())
        self._is_warm = not self.against_dense
        self._seconds = {"fast": 0.0, "dense": 0.0}
        self._tokens = {"fast": 0, "dense": 0}
        self._num_batches = self._num_texts = self._num_same = self._num_drafted = 0

    def run(self, inputs: Mapping[str, Tensor]) -> Int[Tensor, "batch new"]:
        """Generate after a batch of prompts, and count it.

        Args:
            inputs: `input_ids` and `attention_mask`, padded on the left.

        Returns:
            The new tokens of each row.
        """
        if not self._is_warm:
            self._is_warm = True
            other = FastGeneration(
                self.model, self.fast.exits, self.fast.plan, verify=self.fast.verify
            )
            for way in (other, self.model):
                with self._same_randomness():
                    continue_tokens(way, self._tokenizer, inputs, self._settings)
        names = sorted(self._seconds, reverse=bool(self._num_batches % 2))
        if not self.against_dense:
            names = ["fast"]
        found = {}
        for name in names[:-1]:
            with self._same_randomness():
                found[name] = self._time(name, inputs)
        found[names[-1]] = self._time(names[-1], inputs)
        top = self.fast.backbone.num_hidden_layers
        self._num_batches += 1
        self._num_texts += len(found["fast"])
        self._num_drafted += sum(layer < top for row in self.fast.origins for layer in row)
        if self.against_dense:
            pairs = zip(*(self._cut(found[name]) for name in ("fast", "dense")), strict=True)
            self._num_same += sum(one == other for one, other in pairs)
        return found["fast"]

    def read(self) -> FastSpeed:
        """Say what all batches so far have taken."""
        fast, has_dense = self.fast, self.against_dense
        num_layers = fast.backbone.num_hidden_layers
        dense = fast.plan.stay_dense
        return FastSpeed(
            num_texts=self._num_texts,
            num_tokens=self._tokens["fast"],
            seconds=self._seconds["fast"],
            num_hidden_layers=num_layers,
            layers_per_token=float(num_layers) if dense else fast.layers_per_token,
            drafted=self._num_drafted / max(self._tokens["fast"], 1),
            acceptance=fast.acceptance_rate if fast.num_drafted.total() else None,
            stays_dense=dense,
            dense_seconds=self._seconds["dense"] if has_dense else None,
            num_dense_tokens=self._tokens["dense"] if has_dense else None,
            num_same=self._num_same if has_dense else None,
        )

    def _time(self, name: str, inputs: Mapping[str, Tensor]) -> Int[Tensor, "batch new"]:
        """Generate in one way, and count seconds and tokens."""
        way = self.fast if name == "fast" else self.model
        device = self.model.device
        _wait(device)
        start = time.perf_counter()
        tokens = continue_tokens(way, self._tokenizer, inputs, self._settings)
        _wait(device)
        self._seconds[name] += time.perf_counter() - start
        self._tokens[name] += sum(map(len, self._cut(tokens)))
        return tokens

    def _cut(self, tokens: Int[Tensor, "batch new"]) -> list[list[int]]:
        """Cut each row off behind its end."""
        return [cut(row, self._ends) for row in tokens.tolist()]

    @contextmanager
    def _same_randomness(self) -> Iterator[None]:
        """Let what follows draw what this draws."""
        device = self.model.device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            yield


def cut(tokens: list[int], ends: Collection[int]) -> list[int]:
    """Cut tokens off behind the first that ends a text."""
    place = next((at for at, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: place + 1]


def _wait(device: torch.device) -> None:
    """Let the device come to the end of what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
