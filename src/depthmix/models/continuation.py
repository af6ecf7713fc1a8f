"""What a model writes after tokenised prompts, with transformers' options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from depthmix.decoding.fast_generation import FastGeneration
from depthmix.decoding.lazy_depth import LazyDepth
from depthmix.files.settings import read_value, underscored
from depthmix.options.types import suggest

GENERATION_DEFAULTS = {"max_new_tokens": 256}
"""Options of generation that differ from transformers' (20 tokens cut most answers off)."""


def read_generation_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Read generation options, as a command line gives them, against `GenerationConfig`.

    Args:
        options: Values by name; hyphens in names equal underscores.

    Returns:
        Keyword arguments of `GenerationConfig`, our defaults below them.

    Raises:
        ValueError: If `GenerationConfig` has no such option.
    """
    # `GenerationConfig` takes any keyword and ignores what it does not know.
    known = [name for name in GenerationConfig().to_dict() if not name.startswith("_")]
    settings = dict(GENERATION_DEFAULTS)
    for name, value in underscored(options).items():
        if name not in known:
            raise ValueError(
                f"`generation.{name}` is not an option of GenerationConfig{suggest(name, known)}"
            )
        settings[name] = read_value(value, int | float | bool | list | dict | str | None)
    return settings


def pad_prompts(
    prompts: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Int[Tensor, "batch seq"]]:
    """Put prompts into one batch, with padding in front of the shorter ones.

    Args:
        prompts: Token ids of each.
        tokenizer: For its padding token, whose place is masked.

    Returns:
        `input_ids` and `attention_mask`, on the CPU.
    """
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad_token_id = next(number for number in known if number is not None)
    longest = max(map(len, prompts))
    missing = [longest - len(ids) for ids in prompts]
    pairs = list(zip(missing, prompts, strict=True))
    return {
        "input_ids": torch.tensor([[pad_token_id] * gap + list(ids) for gap, ids in pairs]),
        "attention_mask": torch.tensor([[0] * gap + [1] * len(ids) for gap, ids in pairs]),
    }


def continue_inputs(
    model: PreTrainedModel | PeftModel | LazyDepth | FastGeneration,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any],
    streamer: BaseStreamer | None = None,
) -> list[str]:
    """Generate after tokenised prompts, and decode what is new."""
    new_tokens = continue_tokens(model, tokenizer, inputs, settings, streamer)
    return tokenizer.batch_decode(new_tokens, skip_special_tokens=True)


def continue_tokens(
    model: PreTrainedModel | PeftModel | LazyDepth | FastGeneration,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any],
    streamer: BaseStreamer | None = None,
) -> Int[Tensor, "batch new"]:
    """Generate after tokenised prompts, and give what is new."""
    decoder = model if isinstance(model, nn.Module) else model.model
    inputs = {name: value.to(decoder.device) for name, value in inputs.items()}
    with torch.inference_mode():
        sequences = model.generate(  # pyrefly: ignore[not-callable]
            **inputs,
            **settings,
            pad_token_id=tokenizer.pad_token_id,
            tokenizer=tokenizer,  # for `stop_strings`
            streamer=streamer,
        )
    return sequences[:, inputs["input_ids"].shape[1] :]
