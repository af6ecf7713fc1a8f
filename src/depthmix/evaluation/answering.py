"""A model's free answers to the items of a benchmark: batched, and seeded item by item."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TopKLogitsWarper,
)

from depthmix.data.rendering import Prompt
from depthmix.decoding.lazy_depth import LazyDepth
from depthmix.models.asking import greedy, prepared
from depthmix.models.continuation import continue_inputs, pad_prompts

Generator = PreTrainedModel | PeftModel | LazyDepth
"""What has `generate`."""

TOP_K = 50
"""Tokens that sampling chooses from: transformers' own default, with which FastChat sampled."""


class SeededSampling(LogitsProcessor):
    r"""Sample each row of a batch at its own temperature, from its own random numbers.

    Adds Gumbel noise $g$ to the logits $z$, so that greedy decoding takes
    $\arg\max_v z_v / T + g_v$, which is a draw from $\mathrm{softmax}(z / T)$. A row's draws depend
    on its seed alone, and an answer is the same in any batch.

    Args:
        temperatures: One per row; 0 leaves the row greedy.
        seeds: One per row.
    """

    def __init__(self, temperatures: Sequence[float], seeds: Sequence[int]) -> None:
        self.temperatures = temperatures
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(
        self, input_ids: Int[Tensor, "batch seq"], scores: Float[Tensor, "batch vocab"]
    ) -> Float[Tensor, "batch vocab"]:
        """Add the next token's noise."""
        rows = []
        for row, temperature, generator in zip(
            scores, self.temperatures, self._generators, strict=True
        ):
            if temperature:
                # Drawn on the CPU: the same numbers on every device.
                noise = -torch.empty(row.shape).exponential_(generator=generator).log()
                row = row / temperature + noise.to(row)
            rows.append(row)
        return torch.stack(rows)


def answer(
    model: Generator,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperatures: Sequence[float] | None = None,
    seeds: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
) -> list[str]:
    """Let a model go on after one batch of prompts.

    Args:
        model: Decoder, or `LazyDepth` around one; stays in the mode it is in.
        tokenizer: Its tokenizer; its padding stays as it is.
        prompts: What it reads.
        max_new_tokens: Longest answer, in tokens.
        temperatures: One per prompt, 0 for greedy decoding; `None` for all greedy.
        seeds: One per prompt, where temperatures are given.
        stop_strings: Texts at the first of which an answer ends, without it.

    Returns:
        The new text after each prompt, without outer whitespace.
    """
    decoder = model if isinstance(model, nn.Module) else model.model
    settings: dict[str, Any] = {}
    if temperatures is not None and any(temperatures):
        sampling = SeededSampling(temperatures, seeds or [0] * len(prompts))
        settings["logits_processor"] = LogitsProcessorList([TopKLogitsWarper(TOP_K), sampling])
    if stop_strings:
        settings["stop_strings"] = list(stop_strings)
    with prepared(decoder, tokenizer):
        settings["generation_config"] = greedy(decoder, tokenizer, max_new_tokens)
        inputs = pad_prompts([prompt.token_ids for prompt in prompts], tokenizer)
        answers = continue_inputs(model, tokenizer, inputs, settings)
    return [_cut(text, stop_strings).strip() for text in answers]


def derive_seed(*numbers: int) -> int:
    """Make one seed of several numbers, such as a run's seed, an item's number and a turn.

    Args:
        numbers: Not negative.

    Returns:
        A seed of 32 bits.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _cut(text: str, stop_strings: Sequence[str]) -> str:
    """End a text before the first of the stop strings."""
    ends = [text.find(stop) for stop in stop_strings if stop in text]
    return text[: min(ends)] if ends else text
