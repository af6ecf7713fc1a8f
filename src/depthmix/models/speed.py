"""How fast two ways to generate are beside each other, prompt by prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from depthmix.decoding.fast_generation import FastGeneration
from depthmix.models.asking import greedy, prepared
from depthmix.models.turns import Turns, Way


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Two ways to generate, measured on the same prompts, one prompt at a time."""

    speed_up: float
    """Time of dense generation over that of the fast one, of all prompts together."""

    lowest: float
    """The same of the prompt with the smallest gain."""

    highest: float
    """The same of the prompt with the largest gain."""

    dense_tokens_per_second: float
    """New tokens per second of the model's own `generate`, prompts' passes included."""

    fast_tokens_per_second: float
    """New tokens per second of fast generation."""

    num_texts: int
    """Prompts that were measured."""

    num_same: int
    """Texts that were the same, token by token."""


def measure_speed(
    model: PreTrainedModel | PeftModel,
    fast: FastGeneration,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[int, ...]],
    *,
    max_new_tokens: int,
) -> Measurement:
    """Let a model answer prompts in both ways in turn, and compare times and tokens.

    They take turns (`Turns`). The first prompt is answered once before, to warm up.

    Args:
        model: The model, on the device where it is to run.
        fast: Its fast generation.
        tokenizer: Its tokenizer.
        prompts: Token ids of each.
        max_new_tokens: Tokens of a text at most.

    Returns:
        Times and tokens, batch 1.
    """
    with prepared(model, tokenizer), torch.inference_mode():
        config = greedy(model, tokenizer, max_new_tokens)
        own: Any = model.generate

        def by(generate: Callable[..., Any]) -> Way:
            def way(inputs: Mapping[str, Tensor]) -> Int[Tensor, "1 new"]:
                sequences = generate(**inputs, generation_config=config)
                return sequences[:, inputs["input_ids"].shape[1] :]

            return way

        ends: Any = config.eos_token_id
        ways = {"dense": by(own), "fast": by(fast.generate)}
        turns = Turns(ways, device=model.device, ends=ends or ())
        batches = [torch.tensor([prompt], device=model.device) for prompt in prompts]
        inputs = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in batches]
        turns.warm_up(inputs[0])
        for one in inputs:
            turns.run(one)
    dense, quick = turns.seconds["dense"], turns.seconds["fast"]
    ratios = [slow / short for slow, short in zip(dense, quick, strict=True)]
    return Measurement(
        speed_up=sum(dense) / sum(quick),
        lowest=min(ratios),
        highest=max(ratios),
        dense_tokens_per_second=turns.num_tokens["dense"] / sum(dense),
        fast_tokens_per_second=turns.num_tokens["fast"] / sum(quick),
        num_texts=turns.num_texts,
        num_same=turns.num_same,
    )
