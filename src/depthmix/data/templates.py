"""From records to what the trainer and the evaluation read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from depthmix.config import IGNORE_INDEX
from depthmix.data.items import check_choices
from depthmix.data.records import load_records
from depthmix.run_config import EvaluationSection, TrainingTemplate

Record = Mapping[str, Any]

ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
"""Stanford Alpaca's prompt, which LLM-Adapters and the paper use."""

ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
"""The same for instructions about a given input."""

FORMS = (
    "`prompt` and `completion`, `messages` that end with the assistant's, "
    "or `instruction`, `input` (may be left out) and `output`"
)
"""The forms of training records, for messages."""


def to_training_dataset(
    records: Sequence[Record],
    template: TrainingTemplate,
    tokenizer: PreTrainedTokenizerBase,
    *,
    numbers: Sequence[int] | None = None,
) -> datasets.Dataset:
    """Turn records into prompts and completions, on whose completions TRL trains.

    Args:
        records: In one of three forms: `prompt` and `completion`; `messages`, whose last one is the
            completion; `instruction`, `input` and `output`.
        template: How they become text. `auto`: messages by the tokenizer's chat template,
            instructions by Alpaca's, prompts as they are. `plain`: nothing around the text.
            `alpaca` and `chat` take a prompt as the instruction. `lm-eval`: prompts as they are,
            such as `evaluation.tasks.demonstrations` writes.
        tokenizer: For its chat template.
        numbers: Numbers of the records in their source; `None` counts from 1.

    Returns:
        Columns `prompt` and `completion`, and `record` with each record's number.

    Raises:
        ValueError: If a record has not the fields of any form, or nothing to learn.
    """
    if not records:
        raise ValueError("`records` must hold at least one record to train on, got none.")
    numbers = numbers or range(1, len(records) + 1)
    rows = []
    for number, record in zip(numbers, records, strict=True):
        prompt, completion = _to_prompt_and_completion(record, number, template)
        if not isinstance(prompt, str) and not _is_messages(prompt):
            raise ValueError(
                f"Record {number} must have a prompt that is text or a list of messages, "
                f"got {prompt!r:.80}."
            )
        text = completion[-1].get("content") if _is_messages(completion) else completion
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"Record {number} has nothing to learn: its completion must be text, "
                f"got {text!r}; fill it in or remove the record."
            )
        if rows and type(prompt) is not type(rows[0]["prompt"]):
            raise ValueError(
                f"Records must all become text or all become messages, and record {number} differs "
                f"from record {rows[0]['record']}; choose a `data.template`, or train on one form."
            )
        rows.append({"prompt": prompt, "completion": completion, "record": number})
    if isinstance(rows[0]["prompt"], list):
        _check_chat_template(tokenizer)
    return datasets.Dataset.from_list(rows)


def check_label_tokens(dataset: datasets.Dataset, numbers: Sequence[int]) -> None:
    """Check that each record still has tokens to learn after truncation.

    TRL silently drops records whose prompt alone fills `max_length`. The column `record` of
    `to_training_dataset` passes through its preparation and tells which are missing. Packed data
    has no such column; nothing is checked there.

    Args:
        dataset: `train_dataset` of an `SFTTrainer`, tokenised.
        numbers: Numbers of the records that were given to it.

    Raises:
        ValueError: If a record has no label token.
    """
    if "record" not in dataset.column_names:
        return
    trained = {
        number
        for number, labels in zip(dataset["record"], dataset["labels"], strict=True)
        if any(label != IGNORE_INDEX for label in labels)
    }
    missing = [number for number in numbers if number not in trained]
    if missing:
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ValueError(
            f"Record {missing[0]}{others} has no token of its completion left after truncation to "
            "`training.max_length`; raise `training.max_length`, or remove long prompts."
        )


def render_prompt(
    record: Record, template: TrainingTemplate, tokenizer: PreTrainedTokenizerBase
) -> str:
    """Write the text after which a model trained with this template answers.

    Args:
        record: `prompt` (text or messages), or `instruction` and perhaps `input`.
        template: As for `to_training_dataset`.
        tokenizer: For its chat template. A rendered chat brings its own special tokens.

    Returns:
        The prompt as text.

    Raises:
        ValueError: If the record does not fit the template.
    """
    prompt = _to_prompt(record, template)
    if isinstance(prompt, str):
        return prompt
    _check_chat_template(tokenizer)
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


def load_evaluation_records(
    section: EvaluationSection, template: TrainingTemplate, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Read evaluation records and check that they fit their metric.

    Args:
        section: File, metric and number of items.
        template: The one used in training. Prompts are rendered by it.
        tokenizer: For its chat template.

    Returns:
        Records with `prompt` as text and `answer`; for `choices` also `choices`.

    Raises:
        ValueError: If a record has not the fields that the metric needs.
    """
    records = load_records(section.data, split="test", limit=section.num_items)
    if section.metric == "choices":
        check_choices(records, section.data)
    fields = "`prompt` (or `instruction`) and `answer`"
    if section.metric == "choices":
        fields = "`prompt` (or `instruction`), `choices` (a list of texts) and `answer` (its index)"
    checked = []
    for number, record in enumerate(records, start=1):
        answer = record.get("answer")
        prompt = record.get("prompt", record.get("instruction"))
        fits = isinstance(prompt, str | list) and answer not in (None, "")
        if section.metric == "choices":
            answer, choices = _to_index(answer), record.get("choices")
            fits = fits and isinstance(choices, list) and answer in range(len(choices))
        if not fits:
            raise ValueError(
                f"Evaluation records need {fields} for the metric {section.metric}, and record "
                f"{number} of {section.data} has {_name_fields(record)}."
            )
        if section.metric == "exact_match":
            answer = str(answer)
        prompt = render_prompt(record, template, tokenizer)
        checked.append({**record, "prompt": prompt, "answer": answer})
    return checked


def _to_prompt_and_completion(
    record: Record, number: int, template: TrainingTemplate
) -> tuple[Any, Any]:
    """Split one record into what is given and what is learnt, both text or both messages."""
    if messages := record.get("messages"):
        if template in ("plain", "alpaca", "lm-eval"):
            raise ValueError(
                f'`data.template` must be "chat" or "auto" for messages, got {template!r} '
                f"for record {number}."
            )
        answered = _is_messages(messages) and len(messages) > 1
        if not answered or messages[-1]["role"] != "assistant":
            raise ValueError(
                f"Record {number} must have `messages`, each with a role and a content, that end "
                f"with the assistant's answer to an earlier one, got {messages!r:.80}."
            )
        return messages[:-1], messages[-1:]
    if {"prompt", "completion"} <= record.keys():
        completion = record["completion"]
    elif {"instruction", "output"} <= record.keys():
        completion = record["output"]
    else:
        raise ValueError(f"Record {number} must have {FORMS}; it has {_name_fields(record)}.")
    prompt = _to_prompt(record, template)
    if isinstance(prompt, list) and isinstance(completion, str):
        return prompt, [{"role": "assistant", "content": completion}]
    return prompt, completion


def _to_prompt(record: Record, template: TrainingTemplate) -> Any:
    """Apply a template to a record's prompt or instruction; messages stay as they are."""
    if "prompt" in record:
        instruction, context = record["prompt"], ""
        if isinstance(instruction, list):
            return instruction
        template = "plain" if template in ("auto", "lm-eval") else template
        if template == "plain":
            return instruction
    else:
        if template == "lm-eval":
            raise ValueError(
                '`data.template` must not be "lm-eval" for instructions to evaluate on: it writes '
                "training records alone; give records with a `prompt`, or measure named data sets "
                "by `depthmix evaluate`, which asks in the same text."
            )
        instruction, context = record["instruction"], record.get("input") or ""
        template = "alpaca" if template == "auto" else template
    if template == "alpaca":
        text = ALPACA_PROMPT_WITH_INPUT if context else ALPACA_PROMPT
        return text.format(instruction=instruction, input=context)
    text = f"{instruction}\n{context}" if context else instruction
    return [{"role": "user", "content": text}] if template == "chat" else f"{text}\n"


def _is_messages(value: Any) -> bool:
    """Tell whether a value is a conversation."""
    return isinstance(value, list) and all(
        isinstance(message, Mapping) and "role" in message for message in value
    )


def _check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.chat_template is None:
        raise ValueError(
            '`data.template` must not be "chat" for this model, whose tokenizer has no chat '
            'template; choose "alpaca" or "plain", or a model tuned for chat.'
        )


def _to_index(answer: Any) -> int | None:
    """Read an index; CSV files hold it as text."""
    if isinstance(answer, str) and answer.isdecimal():
        return int(answer)
    return answer if isinstance(answer, int) and not isinstance(answer, bool) else None


def _name_fields(record: Record) -> str:
    return ", ".join(f"`{name}`" for name in record) or "no fields"
