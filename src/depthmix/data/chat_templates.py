"""Conversations as text: what a chat template writes, and what it would leave out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

RESERVED = ("messages", "tools", "add_generation_prompt", "continue_final_message")
"""Variables of a chat template that no `chat_template_kwargs` may set."""

LEARNT_FIELDS = ("content", "tool_calls", "reasoning_content", "reasoning", "thinking")
"""Fields of an assistant's message that are learnt, so that a template must write them."""

CODE = re.compile(r"\{[{%].*?[%}]\}", re.DOTALL)
"""What of a chat template is code."""

LITERAL = re.compile(r"'[^']*'|\"[^\"]*\"")
"""Text between quotes, in that code."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """What a chat template writes as a prompt."""

    messages: Sequence[Mapping[str, Any]]
    """What was said, each with its `role`."""

    tools: Sequence[Any] | None = None
    """Functions that the model may call, as JSON schemas; `None` for none."""

    variables: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the template, such as `enable_thinking`."""


def write_messages(
    given: Conversation,
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    **options: Any,
) -> Any:
    """Let a chat template write messages.

    Args:
        given: For its tools and variables.
        messages: What is written.
        tokenizer: Whose template it is.
        options: Of `apply_chat_template`; by default the text is asked for.

    Returns:
        The text, or what the options ask for.

    Raises:
        ValueError: If the template cannot write them.
    """
    options = {"tokenize": False, **options, **given.variables}
    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=list(given.tools) if given.tools else None,
            **options,
        )
    except (TemplateError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"The chat template cannot write this conversation ({reason}): {messages!r:.80}; "
            "change it, or choose another `training.chat_template_path`."
        ) from error


def _read_template(given: Conversation, tokenizer: PreTrainedTokenizerBase) -> str:
    """Give the code of the chat template that writes a conversation."""
    if tokenizer.chat_template is None:
        raise ValueError(
            '`data.template` must not be "chat" for this model, whose tokenizer has no chat '
            'template; choose "alpaca" or "plain", or a model tuned for chat.'
        )
    source = tokenizer.get_chat_template(tools=list(given.tools) if given.tools else None)
    return " ".join(CODE.findall(source))


def check_conversation(given: Conversation, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse what the chat template would leave out in silence.

    Args:
        given: What is to be written.
        tokenizer: Whose template it is.

    Raises:
        ValueError: If there is no template, or it does not read the tools, a variable or tool
            calls.
    """
    code = _read_template(given, tokenizer)
    names = set(re.findall(r"\w+", LITERAL.sub("", code)))
    if given.tools and "tools" not in names:
        raise ValueError(
            "`tools` must be left out for this chat template, which does not write them; choose "
            "one that does by `training.chat_template_path`."
        )
    for name in given.variables:
        if name in RESERVED or name not in names:
            raise ValueError(
                f"`chat_template_kwargs` must be variables that the chat template reads, got "
                f"`{name}`; leave it out, or choose another template by "
                "`training.chat_template_path`."
            )
    if any(message.get("tool_calls") for message in given.messages) and "tool_calls" not in code:
        raise ValueError(
            "`tool_calls` of a message must be left out for this chat template, which does not "
            "write them; choose one that does by `training.chat_template_path`."
        )


def check_learnt(
    given: Conversation,
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Refuse a completion of which the chat template leaves out a part.

    Args:
        given: For its tools and variables.
        messages: All of them; the last is learnt.
        tokenizer: Whose template it is.

    Raises:
        ValueError: If a field of the last message makes no difference.
    """
    last = messages[-1]
    for name in LEARNT_FIELDS[1:]:
        if last.get(name):
            without = {**last, "content": last.get("content") or "", name: None}
            full = {**without, name: last[name]}
            texts = [
                write_messages(given, [*messages[:-1], one], tokenizer) for one in (full, without)
            ]
            if texts[0] == texts[1]:
                raise ValueError(
                    f"`{name}` of the last message must be left out for this chat template, which "
                    "does not write it, so that it would not be learnt; choose one that does by "
                    "`training.chat_template_path`."
                )
