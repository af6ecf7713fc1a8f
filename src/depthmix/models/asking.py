"""A model put in order to be asked: no dropout, padding on the left, the likeliest tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def prepared(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase
) -> Iterator[None]:
    """Put the model in evaluation mode and pad on the left; afterwards, put all of it back."""
    training = [module for module in model.modules() if module.training]
    padding_side, pad_token = tokenizer.padding_side, tokenizer.pad_token
    model.eval()
    tokenizer.padding_side = "left"
    if pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        yield
    finally:
        tokenizer.padding_side, tokenizer.pad_token = padding_side, pad_token
        for module in training:
            module.training = True


def greedy(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> GenerationConfig:
    """Describe plain greedy decoding, whatever the model's own defaults are."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    # What is left at None would be filled in from the model's own generation_config.
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted({*ends, tokenizer.eos_token_id} - {None}) or None,
    )
