"""Texts that a model writes itself: what is drafted when it generates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from depthmix.data.evaluation_records import find_answer, find_question, render_evaluation_records
from depthmix.data.forms import Record, name_fields
from depthmix.data.spec import TrainingTemplate
from depthmix.data.templates import render_prompt
from depthmix.depth.confidences import Continuation
from depthmix.models.asking import greedy, prepared
from depthmix.models.continuation import pad_prompts

BATCH_SIZE = 16
"""Prompts that are continued together."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a record asks, as tokens."""

    prompt: tuple[int, ...]
    """Token ids after which the model answers."""

    answer: tuple[int, ...]
    """Token ids of the record's own answer; empty if it has none."""


def read_questions(
    records: Sequence[Record],
    template: TrainingTemplate,
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str,
    variables: Mapping[str, Any] | None = None,
) -> list[Question]:
    """Render what records ask, in any form of training or evaluation, with or without an answer.

    Args:
        records: With `prompt`, `instruction` or `messages`.
        template: How they become text.
        tokenizer: The model's.
        source: Where they come from, for messages.
        variables: Further variables of the chat template, where a record sets no others.

    Returns:
        The questions.

    Raises:
        ValueError: If a record asks nothing, or does not fit the template.
    """
    questions = []
    for number, record in enumerate(records, start=1):
        asked = find_question(record)
        if asked is None:
            raise ValueError(
                f"`data` must hold records with `prompt`, `instruction` or `messages` for the "
                f"model to answer, and record {number} of {source} has {name_fields(record)}."
            )
        if find_answer(record).strip():
            options: dict[str, Any] = {"source": source, "variables": variables}
            row = render_evaluation_records([record], "loss", template, tokenizer, **options)[0]
            prompt, answer = row["prompt_ids"], row["completion_ids"]
        else:
            prompt = render_prompt(asked, template, tokenizer, variables=variables).token_ids
            answer = ()
        questions.append(Question(prompt=tuple(prompt), answer=tuple(answer)))
    return questions


def write_continuations(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[int, ...]],
    *,
    max_new_tokens: int,
    batch_size: int = BATCH_SIZE,
) -> list[Continuation]:
    """Let a model write after prompts by its own greedy `generate`.

    Args:
        model: The model, on the device where it is to run.
        tokenizer: Its tokenizer.
        prompts: Token ids of each.
        max_new_tokens: Tokens of a text at most.
        batch_size: Prompts that are continued together.

    Returns:
        The texts in the order of the prompts, each up to its end, which is among its tokens.
    """
    written: list[Continuation | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    with prepared(model, tokenizer), torch.inference_mode():
        config = greedy(model, tokenizer, max_new_tokens)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            inputs = pad_prompts([prompts[number] for number in batch], tokenizer)
            inputs = {name: value.to(model.device) for name, value in inputs.items()}
            output: Any = model.generate(  # pyrefly: ignore[not-callable]
                **inputs, generation_config=config
            )
            for number, row in zip(batch, output.tolist(), strict=True):
                new_tokens = row[inputs["input_ids"].shape[1] :]
                written[number] = _cut(prompts[number], new_tokens, config)
    return [text for text in written if text is not None]


def _cut(prompt: tuple[int, ...], tokens: Sequence[int], config: GenerationConfig) -> Continuation:
    """Cut a row off behind the token that ended it."""
    ends = set(config.eos_token_id or ())
    length = next((place + 1 for place, token in enumerate(tokens) if token in ends), None)
    return Continuation(prompt=prompt, tokens=tuple(tokens[:length]), ended=length is not None)
