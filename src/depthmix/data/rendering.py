"""Prompts and completions as token ids: the one place that knows, for training and for asking."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from depthmix.data.chat_templates import (
    LEARNT_FIELDS,
    Conversation,
    check_conversation,
    check_learnt,
    write_messages,
)
from depthmix.method.config import IGNORE_INDEX


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a model reads before it answers."""

    text: str
    """The prompt as text, with the special tokens that a chat template writes."""

    token_ids: tuple[int, ...]
    """Ids of the prompt's tokens, with those that the tokenizer adds to every text."""

    is_chat: bool = False
    """Whether a chat template wrote it, so that the tokenizer adds nothing."""


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """A prompt with its completion, as tokens."""

    prompt: Prompt
    """What is given."""

    num_given: int
    """Tokens at the start of `token_ids` that are given: all of the prompt's, but where a chat
    template writes the prompt in another way once an answer follows."""

    token_ids: tuple[int, ...]
    """What the model reads in training: prompt, completion, and its end."""

    assistant_mask: tuple[int, ...] | None = None
    """1 for tokens that the chat template marks as the assistant's, 0 for others; `None` where it
    was not asked."""

    @property
    def labels(self) -> list[int]:
        """The tokens of the completion, and `IGNORE_INDEX` for those given."""
        return [IGNORE_INDEX] * self.num_given + list(self.token_ids[self.num_given :])


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Turn a text that a model is to go on from into tokens.

    The tokenizer adds its special tokens in front, unless the text begins with the first of them,
    and none behind: an end of the text would end it before the answer.

    Args:
        text: The text.
        tokenizer: The model's.

    Returns:
        Token ids.
    """
    begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    encoded = tokenizer(text, add_special_tokens=not begins, return_special_tokens_mask=True)
    ids: list[int] = encoded["input_ids"]  # pyrefly: ignore[bad-assignment]
    if begins:
        return tuple(ids)
    mask: list[int] = encoded["special_tokens_mask"]  # pyrefly: ignore[bad-assignment]
    # Only what the tokenizer adds is marked. A text without tokens is all marked.
    behind = len(list(takewhile(bool, reversed(mask)))) if 0 in mask else 0
    if 0 not in mask and tokenizer.eos_token_id is not None:
        behind = len(list(takewhile(lambda token: token == tokenizer.eos_token_id, reversed(ids))))
    return tuple(ids[: len(ids) - behind])


def continue_prompt(
    prompt: Prompt, text: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Turn a text that goes on from a prompt into tokens, and leave the prompt's as they are.

    Where no token would span the two, these are the tokens of both together. Where one would, the
    text is tokenised by itself, as it is when a model answers after the prompt.

    Args:
        prompt: What stands before.
        text: What follows it, with the space between them.
        tokenizer: The model's.

    Returns:
        The text's token ids.
    """
    whole = prompt.text + text
    ids = _encode_bare(whole, tokenizer) if prompt.is_chat else encode(whole, tokenizer)
    given = len(prompt.token_ids)
    return ids[given:] if ids[:given] == prompt.token_ids else _encode_alone(text, tokenizer)


def tokenise_prompt(given: str | Conversation, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Turn a prompt into tokens: a text as it is, a conversation by the chat template.

    Args:
        given: Text, or a conversation that the assistant is to answer.
        tokenizer: The model's.

    Returns:
        The prompt, as text and tokens.

    Raises:
        ValueError: If there is no chat template, or it cannot write the conversation.
    """
    if isinstance(given, str):
        return Prompt(text=given, token_ids=encode(given, tokenizer))
    check_conversation(given, tokenizer)
    text = write_messages(given, given.messages, tokenizer, add_generation_prompt=True)
    return Prompt(text=text, token_ids=_encode_bare(text, tokenizer), is_chat=True)


def retokenise(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Turn the text of a rendered prompt into another tokenizer's tokens.

    Args:
        prompt: As some tokenizer rendered it.
        tokenizer: Another one.

    Returns:
        The same text with the other's tokens.
    """
    write = _encode_bare if prompt.is_chat else encode
    return replace(prompt, token_ids=write(prompt.text, tokenizer))


def tokenise_example(
    given: str | Conversation,
    completion: str | Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    marks_assistant: bool = False,
) -> Rendering:
    """Turn a prompt and its completion into tokens, which begin with those of the prompt alone.

    A text is followed by the end-of-sequence token; behind a conversation stands what its template
    writes there.

    Args:
        given: As for `tokenise_prompt`.
        completion: What is learnt: text after a text, the assistant's message after a conversation.
        tokenizer: The model's.
        marks_assistant: Also ask the chat template which tokens are the assistant's.

    Returns:
        The tokens of both.

    Raises:
        ValueError: As `tokenise_prompt`, or if the template leaves out a part of the completion.
    """
    prompt = tokenise_prompt(given, tokenizer)
    if isinstance(given, str):
        assert isinstance(completion, str)
        end = tokenizer.eos_token or ""
        text = completion if completion.endswith(end) else completion + end
        learnt = continue_prompt(prompt, text, tokenizer)
        return _join(prompt, learnt)
    messages: list[Any] = [*given.messages, *completion]
    check_learnt(given, messages, tokenizer)
    whole = write_messages(given, messages, tokenizer)
    if marks_assistant:
        return _mark(given, messages, prompt, tokenizer)
    ids = _encode_bare(whole, tokenizer)
    if ids[: len(prompt.token_ids)] == prompt.token_ids:
        return _join(prompt, ids[len(prompt.token_ids) :])
    if whole.startswith(prompt.text):
        return _join(prompt, _encode_alone(whole[len(prompt.text) :], tokenizer))
    answer = _find_answer(given, messages, whole, tokenizer)
    if answer is not None:
        return _join(prompt, _encode_alone(answer, tokenizer))
    warnings.warn(
        "The chat template writes a prompt in another way once an answer follows: in training the "
        "context ends where the two part, and the model is asked after another one.",
        stacklevel=2,
    )
    return Rendering(prompt=prompt, num_given=_count_same(prompt.token_ids, ids), token_ids=ids)


def find_end(learnt: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Find the token by which a completion ends: what generation is to stop at.

    Args:
        learnt: Tokens of a completion.
        tokenizer: The model's.

    Returns:
        The last token, white space aside, if it is one of those that stand for themselves, such as
        `<|im_end|>`; `None` if the completion ends in words.
    """
    added = tokenizer.added_tokens_decoder
    for token in reversed(learnt):
        if token in added or token == tokenizer.eos_token_id:
            return token
        if str(tokenizer.decode([token])).strip():
            return None
    return None


def _join(prompt: Prompt, learnt: tuple[int, ...]) -> Rendering:
    """Put a completion's tokens behind a prompt's."""
    given = prompt.token_ids
    return Rendering(prompt=prompt, num_given=len(given), token_ids=given + learnt)


def _encode_bare(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokenise a text that brings its special tokens, as a rendered chat does."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _encode_alone(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokenise a text that goes on from tokens, without the space that some put before a text."""
    anchor = _encode_bare("\n", tokenizer)
    ids = _encode_bare(f"\n{text}", tokenizer)
    if ids[: len(anchor)] == anchor:
        return ids[len(anchor) :]
    return _encode_bare(text, tokenizer)


def _count_same(first: Sequence[int], second: Sequence[int]) -> int:
    """Count the tokens that two sequences begin with alike."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _mark(
    given: Conversation,
    messages: Sequence[Mapping[str, Any]],
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
) -> Rendering:
    """Render a conversation as a whole, and ask the template which tokens are the assistant's."""
    marked = write_messages(
        given,
        messages,
        tokenizer,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids = tuple(marked["input_ids"])
    return Rendering(
        prompt=prompt,
        num_given=_count_same(prompt.token_ids, ids),
        token_ids=ids,
        assistant_mask=tuple(marked["assistant_masks"]),
    )


def _find_answer(
    given: Conversation,
    messages: Sequence[Mapping[str, Any]],
    whole: str,
    tokenizer: PreTrainedTokenizerBase,
) -> str | None:
    """Find the answer in a conversation whose template only begins it otherwise when it asks.

    Some ask for an answer behind an empty thought that they leave out of answers.
    """
    said = messages[-1].get("content")
    if not isinstance(said, str) or any(messages[-1].get(name) for name in LEARNT_FIELDS[1:]):
        return None
    start = whole.rfind(said.strip())
    asked = write_messages(given, given.messages, tokenizer)
    return whole[start:] if whole.startswith(asked) and start >= len(asked) else None
