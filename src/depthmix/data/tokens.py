"""Records as token sequences, as TRL makes them of its training data."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from depthmix.config import IGNORE_INDEX
from depthmix.data.templates import Record, to_training_dataset
from depthmix.run_config import TrainingTemplate


def to_token_sequences(
    records: Sequence[Record],
    template: TrainingTemplate,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
) -> list[dict[str, list[int]]]:
    """Turn records into tokens, with those of the completion as labels.

    `SFTTrainer` does the same when it is made, which is too late for what must be known before.

    Args:
        records: In one of the forms of `to_training_dataset`; or with a `text`, all of whose tokens
            count.
        template: How they become text.
        tokenizer: The model's.
        max_length: Tokens of a sequence that are kept, from the start; `None` keeps all.

    Returns:
        Rows with `input_ids` and `labels`, which are `IGNORE_INDEX` on a prompt's tokens.

    Raises:
        ValueError: If a record has not the fields of any form, or nothing to learn.
    """
    if records and all(isinstance(record.get("text"), str) for record in records):
        rows = [(tokenizer(record["text"])["input_ids"], 0) for record in records]
    else:
        dataset = to_training_dataset(records, template, tokenizer)
        pairs = zip(dataset["prompt"], dataset["completion"], strict=True)
        rows = [_tokenise(prompt, completion, tokenizer) for prompt, completion in pairs]
    return [
        {
            "input_ids": ids[:max_length],
            "labels": [*[IGNORE_INDEX] * num_given, *ids[num_given:]][:max_length],
        }
        for ids, num_given in rows
    ]


def _tokenise(
    prompt: Any, completion: Any, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], int]:
    """Give the tokens of a prompt with its completion, and how many of them are the prompt's."""
    if isinstance(prompt, list):
        options: dict[str, Any] = {"tokenize": True, "return_dict": True}
        alone: Any = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)
        whole: Any = tokenizer.apply_chat_template(prompt + completion, **options)
    else:
        end = tokenizer.eos_token or ""
        completion = completion if completion.endswith(end) else completion + end
        alone, whole = tokenizer(prompt), tokenizer(prompt + completion)
    ids = whole["input_ids"]
    # Tokens may merge across the boundary; the completion begins where the two part.
    same = takewhile(lambda pair: pair[0] == pair[1], zip(alone["input_ids"], ids, strict=False))
    return ids, sum(1 for _ in same)
