"""How fast a mixture generates under each Top-K, when layers run only where a token needs them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from depthmix.data.rendering import Prompt
from depthmix.decoding.lazy_depth import LazyDepth
from depthmix.method.norm import active_mixture, set_top_k
from depthmix.models.continuation import pad_prompts


@dataclass(frozen=True, kw_only=True)
class GenerationSpeed:
    """Generation under one Top-K."""

    top_k: int
    """Routes that are kept."""

    tokens_per_second: float
    """New tokens of one sequence."""

    layers_per_token: float
    """Layers that ran for a new token, of all layers."""

    speedup: float
    """Over the same model's dense generation, median of the prompts' ratios."""


def measure_generation(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    top_ks: Sequence[int],
    num_new_tokens: int = 24,
) -> tuple[GenerationSpeed, ...]:
    """Generate after each prompt under each Top-K by turns, one sequence at a time.

    Args:
        model: Decoder with a mixture, in evaluation mode; its Top-K is put back afterwards.
        tokenizer: Its tokenizer.
        prompts: At least one.
        top_ks: Values of Top-K.
        num_new_tokens: Tokens to generate after each prompt.

    Returns:
        One measurement for each Top-K, beside the dense generation of the same model in the same
        turns.

    Raises:
        ValueError: If the model has no mixture, there is no prompt, or a Top-K does not fit.
    """
    mixture = active_mixture(model)
    if mixture is None:
        raise ValueError("`model` must have a mixture, whose routes Top-K chooses from.")
    if not prompts:
        raise ValueError("`prompts` must hold at least one.")
    before = mixture.top_k
    seconds: dict[int, list[float]] = {top_k: [] for top_k in (0, *top_ks)}  # 0 is dense
    layers: dict[int, list[float]] = {top_k: [] for top_k in top_ks}
    options: dict[str, Any] = {"max_new_tokens": num_new_tokens, "min_new_tokens": num_new_tokens}
    options |= {"do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    try:
        for number, prompt in enumerate((prompts[0], *prompts)):
            inputs = pad_prompts([prompt.token_ids], tokenizer)
            inputs = {name: value.to(model.device) for name, value in inputs.items()}
            for top_k, turns in seconds.items():
                set_top_k(model, top_k or None)
                lazy = LazyDepth(model)
                generator: Any = lazy if top_k else model
                started = time.perf_counter()
                with torch.inference_mode():
                    tokens = generator.generate(**inputs, **options)
                tokens.cpu()  # waits for the device
                elapsed = time.perf_counter() - started
                if not number:  # the first turn warms up
                    continue
                turns.append(elapsed)
                if top_k:
                    layers[top_k].append(lazy.layers_per_pass)
    finally:
        set_top_k(model, before)
    return tuple(
        GenerationSpeed(
            top_k=top_k,
            tokens_per_second=num_new_tokens / median(seconds[top_k]),
            layers_per_token=mean(layers[top_k]),
            speedup=median(a / b for a, b in zip(seconds[0], seconds[top_k], strict=True)),
        )
        for top_k in top_ks
    )
