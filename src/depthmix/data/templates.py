"""From records to what the trainer and the evaluation read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from depthmix.data.chat_templates import Conversation
from depthmix.data.forms import Record, to_prompt, to_prompt_and_completion
from depthmix.data.rendering import (
    Prompt,
    Rendering,
    tokenise_example,
    tokenise_prompt,
)
from depthmix.data.spec import TrainingTemplate
from depthmix.libraries.extras import require
from depthmix.method.config import IGNORE_INDEX

if TYPE_CHECKING:
    import datasets


def to_training_dataset(
    records: Sequence[Record],
    template: TrainingTemplate,
    tokenizer: PreTrainedTokenizerBase,
    *,
    numbers: Sequence[int] | None = None,
    variables: Mapping[str, Any] | None = None,
    marks_assistant: bool = False,
) -> datasets.Dataset:
    """Turn records into the tokens of prompts and completions, on whose completions TRL trains.

    TRL takes the tokens as they are. It would make the same ones, but for a token that spans the
    end of a prompt: here the prompt's tokens are those after which the model is asked.

    Args:
        records: In one of three forms: `prompt` and `completion`; `messages`, whose last one is the
            completion; `instruction`, `input` and `output`. With messages also `tools` (JSON
            schemas of functions) and `chat_template_kwargs` (further variables of the template).
        template: How they become text. `auto`: messages by the tokenizer's chat template,
            instructions by Alpaca's, prompts as they are. `plain`: nothing around the text.
            `alpaca` and `chat` take a prompt as the instruction. `lm-eval`: prompts as they are,
            such as `evaluation.tasks.demonstrations` writes.
        tokenizer: The model's, with its chat template and end token.
        numbers: Numbers of the records in their source; `None` counts from 1.
        variables: Further variables of the chat template, where a record sets no others.
        marks_assistant: Add a column `assistant_masks`, for `assistant_only_loss`.

    Returns:
        Columns `prompt` and `completion` (text or messages), `record` with each record's number,
        `input_ids` and `completion_mask`; `tools` and `chat_template_kwargs` where records have
        them.

    Raises:
        ValueError: If a record has not the fields of any form, nothing to learn, or something that
            its template would leave out.
    """
    if not records:
        raise ValueError("`records` must hold at least one record to train on, got none.")
    rows: list[dict[str, Any]] = []
    for number, (given, completion, rendering) in zip(
        numbers or range(1, len(records) + 1),
        render_records(records, template, tokenizer, numbers, variables, marks_assistant),
        strict=True,
    ):
        is_chat = isinstance(given, Conversation)
        row = {
            "prompt": list(given.messages) if isinstance(given, Conversation) else given,
            "completion": completion,
            "record": number,
            "tools": given.tools if isinstance(given, Conversation) else None,
            "chat_template_kwargs": dict(given.variables) if is_chat else {},
            "input_ids": list(rendering.token_ids),
            "completion_mask": [int(label != IGNORE_INDEX) for label in rendering.labels],
        }
        if rendering.assistant_mask is not None:
            row["assistant_masks"] = list(rendering.assistant_mask)
        if rows and type(row["prompt"]) is not type(rows[0]["prompt"]):
            raise ValueError(
                f"Records must all become text or all become messages, and record {number} differs "
                f"from record {rows[0]['record']}; choose a `data.template`, or train on one form."
            )
        rows.append(row)
    return _to_columns(rows)


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
    record: Record,
    template: TrainingTemplate,
    tokenizer: PreTrainedTokenizerBase,
    *,
    variables: Mapping[str, Any] | None = None,
) -> Prompt:
    """Write the prompt after which a model trained with this template answers.

    Args:
        record: `prompt` (text or messages), or `instruction` and perhaps `input`; with messages
            also `tools` and `chat_template_kwargs`.
        template: As for `to_training_dataset`.
        tokenizer: For its chat template.
        variables: Further variables of the chat template, where the record sets no others.

    Returns:
        The prompt, as text and tokens.

    Raises:
        ValueError: If the record does not fit the template.
    """
    return tokenise_prompt(to_prompt(record, template, variables=variables), tokenizer)


def render_records(
    records: Sequence[Record],
    template: TrainingTemplate,
    tokenizer: PreTrainedTokenizerBase,
    numbers: Sequence[int] | None = None,
    variables: Mapping[str, Any] | None = None,
    marks_assistant: bool = False,
) -> Iterator[tuple[str | Conversation, Any, Rendering]]:
    """Render training records one by one.

    Args:
        records: As for `to_training_dataset`.
        template: As there.
        tokenizer: As there.
        numbers: As there.
        variables: As there.
        marks_assistant: Also ask which tokens are the assistant's.

    Yields:
        What is given and what is learnt, as text or messages, and both as tokens.

    Raises:
        ValueError: If a record does not fit; its number is named.
    """
    for number, record in zip(numbers or range(1, len(records) + 1), records, strict=True):
        given, completion = to_prompt_and_completion(record, number, template, variables=variables)
        try:
            rendering = tokenise_example(
                given, completion, tokenizer, marks_assistant=marks_assistant
            )
        except ValueError as error:
            raise ValueError(f"Record {number} cannot be rendered: {error}") from error
        yield given, completion, rendering


def _to_columns(rows: Sequence[dict[str, Any]]) -> datasets.Dataset:
    """Make a data set of rows, whose messages keep the fields that each of them has."""
    require("lab", "A data set", "datasets")
    from datasets import Dataset, Features, Json, List, Value

    names = [
        name
        for name in rows[0]
        if name not in ("tools", "chat_template_kwargs") or any(row[name] for row in rows)
    ]
    is_chat = isinstance(rows[0]["prompt"], list)
    types = {
        **dict.fromkeys(("prompt", "completion"), Json() if is_chat else Value("string")),
        # Arrow would give each message, tool and mapping the fields of all others, as None.
        **dict.fromkeys(("tools", "chat_template_kwargs"), Json()),
        "record": Value("int64"),
        **dict.fromkeys(("input_ids", "completion_mask", "assistant_masks"), List(Value("int64"))),
    }
    return Dataset.from_dict(
        {name: [row[name] for row in rows] for name in names},
        features=Features({name: types[name] for name in names}),
    )
