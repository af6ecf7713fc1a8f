"""The question of a record, and what it takes for two questions to be the same."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

Record = Any
"""A record of any data set, as read or in its schema; a list of texts from a TSV file."""

QUESTION_FIELDS = (
    "prompt",  # before an instruction, as in training
    "instruction",  # before the others: in LLM-Adapters' files it is the text as it was published
    "original_text",  # MAWPS's training file
    "question_stem",
    "question",
    "Question",  # TruthfulQA's CSV
    "ctx",
)
"""Fields that hold a question, in the order in which they are tried."""

ALPACA_PROMPT = re.compile(
    r"### Instruction:\n(?P<question>.*?)\n\n### (?:Input:\n(?P<input>.*?)\n\n### )?Response:",
    re.DOTALL,
)
"""Alpaca's prompt, which may hold another one, without and with an input."""

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

WORD = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]|\w+")
"""A word, or a character of Chinese or Japanese, which put no space between words."""

MIN_TURN_WORDS = 4
"""Words that one of several turns has at least, to be a question; `Go on.` is in many."""


def question_stems(record: Record) -> list[str]:
    """Take the question out of a record, without choices and prompt.

    Args:
        record: From a named data set or a file: with one of `QUESTION_FIELDS`, `turns` or
            `messages`, or a list of texts that begins with the question. Of several, the one that
            training takes.

    Returns:
        The question, with the input of an instruction on a line below; or each turn of a
        conversation. Of several user turns in messages, those of fewer than `MIN_TURN_WORDS`
        words are left out. HellaSwag's context comes twice, without and with its label in front.

    Raises:
        ValueError: If the record holds no question.
    """
    if isinstance(record, Sequence):
        return [_unwrap(record[0].replace("\\n", "\n"))]  # FLAN writes line ends so
    messages = record.get("messages") or record.get("prompt")
    if isinstance(messages, list) and all(isinstance(message, Mapping) for message in messages):
        return _read_user_turns(messages)
    for name in QUESTION_FIELDS:
        if isinstance(record.get(name), str):
            context = record.get("input") if name == "instruction" else None
            stem, label = _unwrap(record[name], context), record.get("activity_label")
            return [stem, f"{label}: {stem}"] if label else [stem]
    turns = record.get("turns")
    if isinstance(turns, list) and all(isinstance(turn, str) for turn in turns):
        return list(turns)
    raise ValueError(
        f"Records must have one of {', '.join(QUESTION_FIELDS)}, turns or messages to be audited, "
        f"as text, and one has only {', '.join(map(str, record))}."
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


def _read_user_turns(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Take the user's turns; of several, those that are long enough to be a question."""
    contents = [message.get("content") for message in messages if message.get("role") == "user"]
    turns = [_unwrap(_read_content(content)) for content in contents]
    if len(turns) == 1:
        return turns
    return [turn for turn in turns if len(WORD.findall(turn)) >= MIN_TURN_WORDS]


def _read_content(content: Any) -> str:
    """Read the text of a message, which may come in parts among images and the like."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else ""
    texts = [part.get("text") for part in content if isinstance(part, Mapping)]
    return "\n".join(text for text in texts if isinstance(text, str))


def _unwrap(text: str, context: Any = None) -> str:
    """Remove prompts and choices; put what the question is about on a line below it."""
    if found := ALPACA_PROMPT.search(text):
        text, context = found["question"], found["input"] or context
    for prompt in PROMPTS:
        if found := prompt.match(text):
            text = found["question"]
    text = CHOICES.sub("", text)
    return f"{text}\n{context}" if context else text
