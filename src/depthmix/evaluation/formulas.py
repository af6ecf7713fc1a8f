"""When two formulas are the same: by math-verify, within bounds that end."""

from __future__ import annotations

import re
import threading
from typing import Any

from depthmix.libraries.extras import require

LONGEST = 300
"""Characters of a formula that is compared; a longer one is not the answer to a question."""

SECONDS = 5
"""Time for one comparison."""

COMMAND = re.compile(r"\\[A-Za-z]+")

MARKUP = re.compile(r"\\(?:text|textbf|mathrm|mathbf|boxed)\s?\{([^{}]*)\}|\\[()\[\],;:! ]|[${}]")
"""What may stand around a text that is no formula."""

SIGNS = re.compile(
    r"[\^=<>≤≥±√∞π] | [a-z)]\s*[-+*/]\s*[0-9a-z(] | [0-9]\s*[-+*/]\s*[a-z(] | ^[(\[].*,.*[)\]]$",
    re.IGNORECASE | re.VERBOSE,
)
"""What makes a text without LaTeX a formula."""

ENDLESS = re.compile(r"\^\s*\{?[^{}]*\^|\^\s*\{?\s*[0-9]{4,}|!|[0-9]{40,}")
"""Towers of powers, huge exponents, factorials: computing them may never end."""


def is_formula(answer: str) -> bool:
    r"""Tell whether a reference is a formula.

    Args:
        answer: A reference that is no number, letter or word.

    Returns:
        Whether it has LaTeX's commands beyond `\text`, or signs of mathematics and no word.
    """
    text = answer.strip().replace("\\{", "(").replace("\\}", ")")
    text = MARKUP.sub(r"\1", text).strip()
    if COMMAND.search(text):
        return True
    return bool(SIGNS.search(text)) and not re.search(r"[^\W\d_]{3,}", text)


def is_same_formula(stated: str, answer: str) -> bool:
    """Compare two formulas by math-verify.

    Args:
        stated: What a response states.
        answer: The reference.

    Returns:
        Whether they are the same in value or, as equations, sets and intervals, in meaning. What
        cannot be read, or would take too long, is not.

    Raises:
        MissingExtraError: If math-verify is not installed.
    """
    check_math_verify()
    texts = [_unwrap(text) for text in (answer, stated)]
    if not all(texts) or any(len(t) > LONGEST or ENDLESS.search(t) for t in texts):
        return False
    if re.search(r"(?<![\\A-Za-z])[A-Za-z]{4,}", COMMAND.sub("", texts[1])):
        return False  # words would be read as products of letters
    from math_verify import parse, verify
    from math_verify.parser import LatexExtractionConfig

    # Its clock is a signal, which other threads than the first cannot have.
    is_first = threading.current_thread() is threading.main_thread()
    seconds = SECONDS if is_first else 0
    rules: Any = [LatexExtractionConfig()]
    clock: Any = {"parsing_timeout": seconds}
    parsed = [parse(f"${text}$", rules, fallback_mode="no_fallback", **clock) for text in texts]
    return all(parsed) and bool(verify(parsed[0], parsed[1], timeout_seconds=seconds))


def check_math_verify() -> None:
    """Check that formulas can be compared.

    Raises:
        MissingExtraError: If math-verify is not installed.
    """
    require("eval", "An answer that is a formula", "math_verify")


def _unwrap(text: str) -> str:
    r"""Take a formula out of `$…$`, `\(…\)`, `\[…\]` or `\boxed{…}`, and drop a final stop."""
    text = text.strip().rstrip(".,;").strip()
    for pattern in (r"\$+(.*?)\$+", r"\\\((.*?)\\\)", r"\\\[(.*?)\\\]", r"\\boxed\{(.*)\}"):
        if found := re.fullmatch(pattern, text, re.DOTALL):
            text = found[1].strip()
    return text.replace("≤", r"\le ").replace("≥", r"\ge ").replace("π", r"\pi ")
