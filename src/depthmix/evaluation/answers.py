r"""When a generated answer is right: the one rule for records of one's own, in and after training.

What the reference is decides how a response is read:

1. A number: the number that the response states, as `extraction` says, or the only one of a
   response of one sentence, must equal it.
2. A letter, A to E: the letter that the response states must be it.
3. A formula, such as `\frac{x}{2}`, `(1, 2)` or `x = 5`: what the response states must be the same
   by math-verify.
4. Any other text, `yes` and `no` among them: what the response states must be it, but for case,
   white space, marks around it and a final full stop.

A text or a formula is stated behind the last mark (`\boxed{`, `answer is`, …), as a first line of
its own, or as the whole response. What follows an invented further question does not count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from depthmix.evaluation.extraction import (
    NUMBER_MARK,
    only_number,
    stated_letter,
    stated_number,
)
from depthmix.evaluation.formulas import is_formula, is_same_formula
from depthmix.evaluation.numbers import is_same_number, plain, read_number

END_OF_RESPONSE = re.compile(r"\n\s*(?:Question:|### Instruction:)")

WRAPPING = " \t\n*_`\"'“”‘’$.,:;!"  # noqa: RUF001
"""Signs around an answer that are no part of it."""

TRUTH_VALUES = ("yes", "no", "true", "false")
"""Answers that a response may begin with, and then explain."""


def is_correct(response: str, answer: str) -> bool:
    r"""Judge a generated response by the reference answer.

    Args:
        response: Text that the model generated.
        answer: Reference: a number (`12`, `$1,200`, `50%`, `\frac{1}{2}`), a letter (`C`, `(C)`), a
            formula in LaTeX, or a text.

    Returns:
        Whether they agree.

    Raises:
        RuntimeError: If the reference is a formula, and math-verify is not installed.
    """
    text = END_OF_RESPONSE.split(response.strip(), maxsplit=1)[0]
    if number := find_number(answer):
        stated = stated_number(text) or only_number(text)
        return stated is not None and is_same_number(stated, number)
    letter = re.fullmatch(r"\(?([A-Ea-e])\)?", _bare(answer))
    if letter and (stated := stated_letter(plain(text))):
        return stated == letter[1].upper()
    candidates = list(_list_stated(text))
    if any(_same_text(candidate, answer) for candidate in candidates):
        return True
    if is_formula(answer):
        return any(is_same_formula(candidate, answer) for candidate in candidates)
    first = re.match(r"\W*(\w+)\s*(?:[.,:;!\n–—-]|$)", plain(text))  # noqa: RUF001
    says = first is not None and not NUMBER_MARK.search(text)
    return says and _bare(answer) in TRUTH_VALUES and _bare(first[1]) == _bare(answer)


def find_number(answer: str) -> str | None:
    """Read a reference as a number.

    Args:
        answer: The reference.

    Returns:
        The number without its per cent or degree sign, as `read_number` takes it; `None` if the
        reference is no number.
    """
    text = plain(answer).strip().strip("$").removesuffix(".").rstrip("%° ")
    text = text if read_number(text) is not None else plain(answer).strip().rstrip("%° ")
    return text if read_number(text) is not None else None


def needs_math_verify(answer: str) -> bool:
    """Tell whether a reference can only be compared by math-verify.

    Args:
        answer: The reference.

    Returns:
        Whether it is a formula.
    """
    return find_number(answer) is None and is_formula(answer)


def _list_stated(text: str) -> Iterator[str]:
    """List what a response may state as a text or a formula, of which one must be the answer."""
    mark = next(reversed(list(NUMBER_MARK.finditer(text))), None)
    if mark is None:
        yield text
        yield text.strip().partition("\n")[0]
        return
    if mark[0].startswith("\\boxed"):
        yield _enclosed(text[mark.end() :])
        return
    rest = text[mark.end() :].strip(" \n:*_")
    yield rest
    line = rest.partition("\n")[0]
    yield line
    yield re.split(r"(?<=[^\W\d_]{2})[.!;](?:\s|$)|[.!;]\s", line, maxsplit=1)[0]


def _enclosed(text: str) -> str:
    """Take what stands before the brace that closes one opened before the text."""
    depth = 1
    for place, sign in enumerate(text):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        if not depth:
            return text[:place]
    return text


def _same_text(stated: str, answer: str) -> bool:
    """Compare texts but for what does not matter."""
    return _bare(stated) == _bare(answer)


def _bare(text: str) -> str:
    r"""Write a text without case, superfluous space, marks around it and LaTeX's `\text`."""
    text = plain(text).strip(WRAPPING).casefold()
    return " ".join(text.split())
