"""The question of a record, and what it takes for two questions to be the same."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

Record = Any
"""A record of any data set, as read or in its schema; a list of texts from a TSV file."""

QUESTION_FIELDS = (
    "instruction",  # first: in LLM-Adapters' files it is the text as it was published
    "original_text",  # MAWPS's training file
    "question_stem",
    "question",
    "Question",  # TruthfulQA's CSV
    "ctx",
    "prompt",
)
"""Fields that hold a question, in the order in which they are tried."""

ALPACA_PROMPT = re.compile(r"### Instruction:\n(?P<question>.*?)\n\n###", re.DOTALL)
"""Alpaca's prompt, which may hold another one."""

PROMPTS = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"Please choose the correct (?:answer|ending)[^:]*: (?P<question>.*?)"
        r"\n\n(?:Answer|Ending)1: ",
        r"Please answer the following question with true or false, question: (?P<question>.*?)"
        r"\n\nAnswer format: ",
        r"Question: (?P<question>.*?)\s*\nAnswer:",
    )
)
"""LLM-Adapters' prompts, and that of lm-eval."""

CHOICES = re.compile(r"\s(?:Answer Choices|Options):\s*\(A\).*", re.DOTALL)
"""AQuA's options behind the question."""


def question_stems(record: Record) -> list[str]:
    """Take the question out of a record, without choices and prompt.

    Args:
        record: From a named data set or a file: with one of `QUESTION_FIELDS`, `turns` or
            `messages`, or a list of texts that begins with the question.

    Returns:
        The question, or each turn of a conversation. HellaSwag's context comes twice, without and
        with its label in front.

    Raises:
        ValueError: If the record holds no question.
    """
    if isinstance(record, Sequence):
        return [_unwrap(record[0].replace("\\n", "\n"))]  # FLAN writes line ends so
    if "turns" in record:
        return list(record["turns"])
    messages = record.get("messages", record.get("prompt"))
    if isinstance(messages, list):
        return [_unwrap(turn["content"]) for turn in messages if turn["role"] == "user"]
    for name in QUESTION_FIELDS:
        if isinstance(record.get(name), str):
            stem, label = _unwrap(record[name]), record.get("activity_label")
            return [stem, f"{label}: {stem}"] if label else [stem]
    raise ValueError(
        f"Records must have one of {', '.join(QUESTION_FIELDS)}, turns or messages to be audited, "
        f"and one has only {', '.join(record)}."
    )


def same_words(text: str) -> str:
    """Lower the case and collapse white space.

    Args:
        text: A question.

    Returns:
        Its words, each parted from the next by one space.
    """
    return " ".join(text.lower().split())


def same_letters(text: str) -> str:
    """Keep letters and digits, in lower case.

    Args:
        text: A question.

    Returns:
        The same for `Tickets .` as for `tickets.`; nothing for a text of signs alone.
    """
    return "".join(filter(str.isalnum, text.lower()))


def _unwrap(text: str) -> str:
    """Remove prompts and choices."""
    if found := ALPACA_PROMPT.search(text):
        text = found["question"]
    for prompt in PROMPTS:
        if found := prompt.match(text):
            text = found["question"]
    return CHOICES.sub("", text)
