"""From records to prompts and completions, as text or as conversations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from depthmix.data.chat_templates import Conversation
from depthmix.data.spec import TrainingTemplate

Record = Mapping[str, Any]

Form = Literal["prompt", "instruction", "messages"]
"""What a record asks by."""

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

ALPACA_TURN = "\n\n### Instruction:"
"""What begins a further turn of Alpaca's prompt."""

FORMS = (
    "`prompt` and `completion`, `messages` that end with the assistant's, "
    "or `instruction`, `input` (may be left out) and `output`"
)
"""The forms of training records, for messages."""


CHAT_FIELDS = ("tools", "chat_template_kwargs")
"""Fields of a record that a chat template reads beside the messages."""


def to_prompt(
    record: Record, template: TrainingTemplate, *, variables: Mapping[str, Any] | None = None
) -> str | Conversation:
    """Apply a template to a record's prompt or instruction; messages stay as they are.

    Args:
        record: As for `render_prompt`.
        template: As for `to_training_dataset`.
        variables: As for `render_prompt`.

    Returns:
        Text, or a conversation that the chat template is to write.

    Raises:
        ValueError: If the record does not fit the template.
    """
    given = _fill_in(record, template)
    fields = {name: _read_json(record[name]) for name in CHAT_FIELDS if record.get(name)}
    if isinstance(given, str):
        if used := [name for name in CHAT_FIELDS if fields.get(name)]:
            raise ValueError(
                f'`{used[0]}` of a record must come with messages or under the template "chat", '
                f"since only a chat template reads it, got it beside the text {given!r:.60}."
            )
        return given
    if not is_messages(given):
        raise ValueError(f"`prompt` must be text or a list of messages, got {given!r:.80}.")
    tools, own = (fields.get(name) for name in CHAT_FIELDS)
    if not isinstance(tools, list | None):
        raise ValueError(f"`tools` must be a list of JSON schemas, got {tools!r:.80}.")
    if not isinstance(own, Mapping | None):
        raise ValueError(
            f"`chat_template_kwargs` must be values by the name of a variable, got {own!r:.80}."
        )
    named = {name: value for name, value in (own or {}).items() if value is not None}
    return Conversation(messages=given, tools=tools, variables={**(variables or {}), **named})


def to_prompt_and_completion(
    record: Record,
    number: int,
    template: TrainingTemplate,
    *,
    variables: Mapping[str, Any] | None = None,
) -> tuple[str | Conversation, Any]:
    """Split one training record into what is given and what is learnt.

    Args:
        record: In one of the forms of `to_training_dataset`.
        number: Its number, for messages.
        template: As for `to_training_dataset`.
        variables: As for `render_prompt`.

    Returns:
        A text and the text that follows it, or a conversation and the messages that follow it.

    Raises:
        ValueError: If the record does not fit.
    """
    if messages := record.get("messages"):
        _check_template_of_messages(template, number)
        answered = is_messages(messages) and len(messages) > 1
        if not answered or messages[-1]["role"] != "assistant":
            raise ValueError(
                f"Record {number} must have `messages`, each with a role and a content, that end "
                f"with the assistant's answer to an earlier one, got {messages!r:.80}."
            )
        given = {name: record.get(name) for name in CHAT_FIELDS}
        prompt = _to_numbered({"prompt": messages[:-1], **given}, number, template, variables)
        completion = messages[-1:]
    elif {"prompt", "completion"} <= record.keys():
        completion = record["completion"]
        _check_prompt(record["prompt"], number)
        prompt = _to_numbered(record, number, template, variables)
    elif {"instruction", "output"} <= record.keys():
        completion = record["output"]
        prompt = _to_numbered(record, number, template, variables)
    else:
        raise ValueError(f"Record {number} must have {FORMS}; it has {name_fields(record)}.")
    if isinstance(prompt, Conversation) and isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    _check_completion(prompt, completion, number)
    return prompt, completion


def find_form(records: Sequence[Record]) -> Form:
    """Say in which form training records are.

    Args:
        records: Training records.

    Returns:
        `messages` or `instruction` if all are, or else `prompt`.
    """
    if all(is_messages(record.get("messages", record.get("prompt"))) for record in records):
        return "messages"
    is_instruction = all("instruction" in record and "prompt" not in record for record in records)
    return "instruction" if is_instruction else "prompt"


def share_variables(records: Sequence[Record]) -> dict[str, Any]:
    """Find the `chat_template_kwargs` that all training records have.

    Args:
        records: Training records.

    Returns:
        Values by name; empty where records differ.
    """
    given = [_read_json(record.get("chat_template_kwargs")) for record in records]
    first = given[0] if given else None
    if not isinstance(first, Mapping) or any(other != first for other in given):
        return {}
    return {name: value for name, value in first.items() if value is not None}


def write_alpaca_turns(questions: Sequence[str], answers: Sequence[str]) -> str:
    """Write a conversation as a series of Alpaca's prompts, up to the next answer.

    Args:
        questions: The user's turns.
        answers: What was answered so far.

    Returns:
        The text after which the model gives its next answer.
    """
    text = ALPACA_PROMPT.format(instruction=questions[0])
    for said, question in zip(answers, questions[1:], strict=False):
        text += f"{said}{ALPACA_TURN}\n{question}\n\n### Response:\n"
    return text


def is_messages(value: Any) -> bool:
    """Tell whether a value is a conversation.

    Args:
        value: Anything.

    Returns:
        Whether it is a list of messages, at least one, each with its role.
    """
    return isinstance(value, list) and all(
        isinstance(message, Mapping) and "role" in message for message in value or [None]
    )


def name_fields(record: Record) -> str:
    """List a record's fields for a message.

    Args:
        record: Any record.

    Returns:
        Their names.
    """
    return ", ".join(f"`{name}`" for name in record) or "no fields"


def _to_numbered(
    record: Record, number: int, template: TrainingTemplate, variables: Mapping[str, Any] | None
) -> str | Conversation:
    """Apply a template, and say of which record it is what is wrong."""
    try:
        return to_prompt(record, template, variables=variables)
    except ValueError as error:
        raise ValueError(f"Record {number} does not fit: {error}") from error


def _fill_in(record: Record, template: TrainingTemplate) -> Any:
    """Give the text or the messages that a template makes of a prompt or an instruction."""
    if "prompt" in record:
        instruction, context = record["prompt"], ""
        if isinstance(instruction, list):
            _check_template_of_messages(template)
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


def _check_template_of_messages(template: TrainingTemplate, number: int | None = None) -> None:
    """Refuse a template that would be ignored, since messages are written by the chat template."""
    if template in ("plain", "alpaca", "lm-eval"):
        where = "a record" if number is None else f"record {number}"
        raise ValueError(
            f'`data.template` must be "chat" or "auto" for messages, got {template!r} for {where}.'
        )


def _check_prompt(prompt: Any, number: int) -> None:
    if not isinstance(prompt, str) and not is_messages(prompt):
        raise ValueError(
            f"Record {number} must have a prompt that is text or a list of messages, "
            f"got {prompt!r:.80}."
        )


def _check_completion(prompt: str | Conversation, completion: Any, number: int) -> None:
    """Refuse a completion that cannot follow its prompt, or that holds nothing to learn."""
    learnt = completion
    if isinstance(prompt, Conversation) and is_messages(completion) and completion:
        last = completion[-1]
        if last.get("tool_calls") and not last.get("content"):
            return
        learnt = last.get("content")
    if not isinstance(learnt, str) or not learnt.strip():
        raise ValueError(
            f"Record {number} has nothing to learn: its completion must be text, "
            f"got {learnt!r}; fill it in or remove the record."
        )


def _read_json(value: Any) -> Any:
    """Read a value that a CSV or Parquet file may hold as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
