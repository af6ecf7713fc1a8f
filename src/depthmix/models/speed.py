"""How fast two ways to generate are beside each other, prompt by prompt."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from depthmix.decoding.fast_generation import FastGeneration
from depthmix.models.asking import greedy, prepared


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

    Which way begins changes from prompt to prompt. The first prompt is answered once before, to
    warm up.

    Args:
        model: The model, on the device where it is to run.
        fast: Its fast generation.
        tokenizer: Its tokenizer.
        prompts: Token ids of each.
        max_new_tokens: Tokens of a text at most.

    Returns:
        Times and tokens, batch 1.
    """
    times: dict[str, list[float]] = {"dense": [], "fast": []}
    num_same = num_dense = num_fast = 0
    with prepared(model, tokenizer), torch.inference_mode():
        config = greedy(model, tokenizer, max_new_tokens)
        own: Any = model.generate
        ways: dict[str, Callable[..., Any]] = {"dense": own, "fast": fast.generate}
        for turn, prompt in enumerate([prompts[0], *prompts]):
            input_ids = torch.tensor([prompt], device=model.device)
            mask = torch.ones_like(input_ids)
            outputs: dict[str, Int[Tensor, "1 seq"]] = {}
            for name in sorted(ways, reverse=bool(turn % 2)):
                _wait(model.device)
                start = time.perf_counter()
                outputs[name] = ways[name](
                    input_ids=input_ids, attention_mask=mask, generation_config=config
                )
                _wait(model.device)
                times[name].append(time.perf_counter() - start)
            if turn:
                num_same += torch.equal(outputs["dense"], outputs["fast"])
                num_dense += outputs["dense"].shape[1] - len(prompt)
                num_fast += outputs["fast"].shape[1] - len(prompt)
    dense, quick = times["dense"][1:], times["fast"][1:]
    ratios = [slow / short for slow, short in zip(dense, quick, strict=True)]
    return Measurement(
        speed_up=sum(dense) / sum(quick),
        lowest=min(ratios),
        highest=max(ratios),
        dense_tokens_per_second=num_dense / sum(dense),
        fast_tokens_per_second=num_fast / sum(quick),
        num_texts=len(prompts),
        num_same=num_same,
    )


def _wait(device: torch.device) -> None:
    """Let the device come to the end of what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
