r"""The answer that a generated text gives, by the rules of each protocol.

The protocol `default` takes only what a text states as its answer; all else is unanswered, which is
`None` here. The first of these that fits states a number:

1. The last mark (`####`, `\boxed{`, `answer is`, `answer:`, `answer =`, a line that is nothing but
   `Answer`) whose sentence holds a number: the number right behind it, or behind the sentence's
   last `=`, or the sentence's only number if it does not say `not`. After a line break the number
   must be alone on its line.
2. A first line that is nothing but the number.
3. The last sentence that begins with `Therefore`, `Thus`, `Hence` or `So`: the number behind its
   last `=`, or its only number, as in 1.
4. A last line whose last `=` is followed by nothing but the number.

"Nothing but" allows three words, as units have. A number that goes on (`3 * 4`, `5 or 6`, `10:30`,
`1,2`, `1st`, `1.5 million`) states nothing. Numbers in words are not read, but for a part behind a
whole number (`12 and a half`) and `minus`. LaTeX's `1{,}200`, `\$`, `\%` and `\frac{3}{4}` are
read. And a letter:

1. The last mark (also `option is`, `choice is`) with a letter right behind it.
2. A first line that is nothing but the letter: `B`, `(B).`, `**B**`.
3. The only letter that the text sets off, as `(B)` or `option B`, or `B)` at its beginning.

The protocol `llm-adapters` follows AGI-Edgerunners/LLM-Adapters (`evaluate.py` and
`commonsense_evaluate.py`), whose numbers are often compared with: the last number anywhere, the
first capital A to E anywhere, the first of some words anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from depthmix.evaluation.numbers import GOES_ON, NUMBER, is_part, plain, value, write

VERB = (
    r"(?:[*_\s]*\([^()\n]*\)|\s+(?:in|to)\s[^.:=\n]{1,40}?)?"
    r"[*_\s]*(?:(?:is|equals|would\ be|will\ be)\b|[:=])"
)
HEADING = r"^[#*_\ ]*(?:final\ )?answer[*_\ ]*$"
NUMBER_MARK = re.compile(
    rf"####|\\boxed\{{|\banswers?\b{VERB}|{HEADING}", re.IGNORECASE | re.MULTILINE
)
LETTER_MARK = re.compile(
    rf"####|\\boxed\{{|\b(?:answer|option|choice)s?\b{VERB}|{HEADING}",
    re.IGNORECASE | re.MULTILINE,
)

CONCLUSION = re.compile(r"(?:^|[.!?\n])\s*(?:therefore|thus|hence|so)\b", re.IGNORECASE)

OPENING = re.compile(r"""[\s:*_~`"'“(\[{]*(?:(?:about|approximately|exactly)\s+)?[*_]*""")
"""What may stand between a mark and a number."""

FEW_WORDS = re.compile(r"[^\w\n]*(?:[^\W\d_]+(?:[^\w\n]+|$)){0,3}")
"""What may follow a number on its line where no mark precedes it."""

SENTENCE = re.compile(r"(?:[0-9]\.\s)?(?:[^.;?!\n]|\.(?=[0-9]))*")

NOT = re.compile(r"\bnot\b|n't\b")

LETTER = re.compile(
    r"""
    [\s:*_~`"'“\[{]* (?:(?i:option|choice)\s+)? [*_]*
    (?:
        \(\s*(?P<enclosed>[A-Ea-e])\s*\)
        | (?P<bare>[A-E]) (?![\w'\N{RIGHT SINGLE QUOTATION MARK}(]|\s*[=+/^])
          (?!(?<=A)\s+[a-z])                          # not "A train"
    )
    (?!\)?\s*(?:,|/|or|and)\s*\(?[A-E]\b)           # not "B or C"
    """,
    re.VERBOSE,
)
"""The letter that follows a mark."""

LONE_LETTER = re.compile(r"[\s*_~`\"'“]*(?i:option\s+)?[*_]*\(?([A-E])\)?[*_.:\"'”]*\s*(?:\n|$)")
"""A first line that is nothing but a letter."""

NAMED_LETTER = re.compile(
    r"(?<!\w)\(([A-E])\) | \b[Oo]ption\ ([A-E])\b | ^\W*([A-E])(?:[).:](?=\s|$)|\*)", re.VERBOSE
)
"""A letter that the text sets off; at its beginning, also `B)`, `B.` and `B:`."""

REACH = 200
"""Characters behind a mark that are read."""


def stated_number(text: str) -> str | None:
    """Extract the number that a text states as its answer (protocol `default`).

    Args:
        text: Generated text.

    Returns:
        The number without currency, thousands separators and unit, as `read_number` reads it
        (`1200`, `-0.50`, `3/4`, `1 1/2`), or `None` if the text states none.
    """
    number = _find_number(plain(text))
    return None if number is None else write(number)


def only_number(text: str) -> str | None:
    """Extract the number of a text that is one sentence with one number: `It is 12`.

    Args:
        text: Generated text.

    Returns:
        As `stated_number`; `None` if the text goes on, says `not`, or has no or another number.
    """
    sentence = plain(text).strip().rstrip(".!")
    number = _result(sentence) if SENTENCE.fullmatch(sentence) else None
    return None if number is None else write(number)


def stated_letter(text: str) -> str | None:
    """Extract the letter, A to E, that a text states as its answer (protocol `default`).

    Args:
        text: Generated text.

    Returns:
        The letter as a capital, or `None` if the text states none.
    """
    for mark in reversed(list(LETTER_MARK.finditer(text))):
        if letter := LETTER.match(text, mark.end(), mark.end() + REACH):
            return (letter["enclosed"] or letter["bare"]).upper()
    if letter := LONE_LETTER.match(text):
        return letter[1]
    named = {letter for groups in NAMED_LETTER.findall(text) for letter in groups if letter}
    return named.pop() if len(named) == 1 else None


def last_number(text: str) -> str | None:
    """Extract an answer as LLM-Adapters does: the last number anywhere, without commas.

    Its quirks are kept: the hyphen of `8-3` is a sign, `3/4` ends in 4, a unit's digits (`m2`) and
    a question that the model goes on to invent count.

    Args:
        text: Generated text.

    Returns:
        The number's text, or `None` if there is none.
    """
    numbers = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return numbers[-1] if numbers else None


def first_word(text: str, words: Sequence[str]) -> str | None:
    """Extract a choice as LLM-Adapters does: the first of some words, wherever it stands.

    Also inside other words: the A of `All`, the `true` of `untrue`. Capitals matter.

    Args:
        text: Generated text.
        words: Choices, such as `A` to `E`, `true` and `false`, or `answer1` to `answer5`.

    Returns:
        The word, or `None` if there is none.
    """
    found = re.search("|".join(map(re.escape, words)), text)
    return found[0] if found else None


def _find_number(text: str) -> re.Match[str] | None:
    """Match the number that a plain text states, by the rules above."""
    for mark in reversed(list(NUMBER_MARK.finditer(text))):
        sentence = _sentence(text, mark.end())
        if NUMBER.search(sentence):
            return _right_behind(text, mark.end()) or _result(sentence)
    lines = text.strip().splitlines() or [""]
    conclusions = [mark.end() for mark in CONCLUSION.finditer(text)][-1:]
    return (
        _lone_number(lines[0])
        or next((_result(_sentence(text, start)) for start in conclusions), None)
        or _lone_number(_after_equals(lines[-1]))
    )


def _sentence(text: str, start: int) -> str:
    """Take the sentence at a place, but for spaces and marks before it."""
    opening = OPENING.match(text, start, start + REACH)
    assert opening is not None
    sentence = SENTENCE.match(text, opening.end(), start + REACH)
    assert sentence is not None
    return sentence[0]


def _after_equals(text: str) -> str:
    """Take what follows the last `=`; nothing if there is none."""
    _, equals, rest = text.rpartition("=")
    return rest if equals else ""


def _leading_number(text: str) -> re.Match[str] | None:
    """Match the number with which a text begins, unless it goes on."""
    opening = OPENING.match(text)
    assert opening is not None
    number = NUMBER.match(text, opening.end())
    return None if number is None or GOES_ON.match(text, number.end()) else number


def _lone_number(line: str) -> re.Match[str] | None:
    """Match the number of a line that holds nothing but it and at most three words."""
    number = _leading_number(line)
    return number if number and FEW_WORDS.fullmatch(line, number.end()) else None


def _right_behind(text: str, start: int) -> re.Match[str] | None:
    """Match the number right behind a mark; after a line break, it must be alone on its line."""
    rest = text[start : start + REACH]
    lines = rest.strip(" :*_").splitlines() or [""]
    if lines[0]:
        return _leading_number(lines[0])
    return _lone_number(rest.strip(" :*_").strip().partition("\n")[0])


def _result(sentence: str) -> re.Match[str] | None:
    """Match the number behind a sentence's last `=`, or its only one if it does not say `not`."""
    if number := _leading_number(_after_equals(sentence)):
        return number
    numbers = list(NUMBER.finditer(sentence))
    alike = len({value(number) for number in numbers}) == 1
    if not alike or any(map(is_part, numbers)) or NOT.search(sentence):
        return None
    return numbers[0]
