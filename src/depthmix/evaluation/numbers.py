"""Numbers in a text: how they are written, what they are worth, when two are the same."""

from __future__ import annotations

import re
from fractions import Fraction

NUMBER = re.compile(
    r"""
    (?P<sign>[-+\N{MINUS SIGN}]?) (?:[$£€]\s?)?        # -5, -$5
    (?P<inner_sign>[-\N{MINUS SIGN}]?)                 # $-5
    (?:
        (?:(?P<whole>[0-9]{1,40})\ )?                  # 1 1/2
        (?P<numerator>[0-9]{1,40})/(?P<denominator>0{0,9}[1-9][0-9]{0,30})
        |
        (?P<decimal>
            [0-9]{1,3}(?:,[0-9]{3}){1,12}(?:\.[0-9]{1,40})?
            | [0-9]{1,40}(?:\.[0-9]{1,40})? | \.[0-9]{1,40}
        )
    )
    """,
    re.VERBOSE,
)
"""An integer, a decimal, a fraction or a mixed number, with sign and currency."""

GOES_ON = re.compile(
    r"""
    \w*[0-9] | [.,:\ ][0-9] | /\w                      # 1e3, 1.2.3, 1,2, 10:30, 9 500
    | \^?\{?(?:st|nd|rd|th)\b                          # 1st
    | k\b | [\s-]*(?:hundred|thousand|million|billion|trillion|dozen)s?\b
    | \s+(?:squared|cubed)\b | \s+point\s+\w        # 12 point five
    | \s*\\[A-Za-z]                                    # 2\pi
    | %?(?:\s+[a-z]+){0,5}\s*                          # 3 * 4, 2 hours and 30 minutes, 5 or 6
      (?:\b(?:and|of|or|to|times|plus|minus|over|by)\b
         | [-+*/^÷·x\N{MULTIPLICATION SIGN}\N{MINUS SIGN}\N{EN DASH}])
      \s*[({$£€]*\.?[0-9]
    """,
    re.VERBOSE,
)
"""What may not follow a number: it would be part of something else."""

PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "eighth": 8}
PARTS |= {"tenth": 10, "halve": 2}
COUNTS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5}

PART_IN_WORDS = re.compile(
    rf"(?<=[0-9])(?P<unit>\s[A-Za-z]+)??\s+and\s+(?P<count>{'|'.join(COUNTS)})[\s-]"
    rf"(?P<part>{'|'.join(PARTS)})s?\b",
    re.IGNORECASE,
)
"""A part in words behind a whole number: `12 and a half`, `2 hours and three quarters`."""

MINUS_IN_WORDS = re.compile(r"\b(?:minus|negative)\s+(?=[$£€]?\.?[0-9])", re.IGNORECASE)

VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅛": "1/8"}

LATEX = (
    (re.compile(r"\\[()\[\]]"), " "),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"(?<=[0-9])(?:\{,\}|\\,|,\\!)(?=[0-9])"), ","),
    (re.compile(r"\\[,;:!]"), " "),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s?\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\^\s?(?:\\circ|\{\\circ\})"), "°"),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])"), "*"),
    (re.compile(r"(?<=[0-9])\s?(?=\\[dt]?frac)"), " "),
    (re.compile(r"\\[dt]?frac\s?\{([0-9]+)\}\s?\{([0-9]+)\}(?![0-9])"), r"\1/\2"),
    (re.compile(r"\\[dt]?frac\s?([0-9])\s?([0-9])(?![0-9])"), r"\1/\2"),
)
"""LaTeX's ways of writing, and the plain ones; in this order."""

CLOSE = 0.001
"""LLM-Adapters' tolerance."""


def plain(text: str) -> str:
    r"""Write a text's LaTeX numbers, and those that are partly words, as plain ones.

    Args:
        text: Any text, such as `\$1{,}200`, `2\frac{1}{2}`, `90^\circ`, `12\text{ cm}`, `12½`,
            `12 and a half` or `minus 3`.

    Returns:
        The text with `$1,200`, `2 1/2`, `90°`, `12 cm`, `12 1/2` and `-3`. Fractions of anything
        but digits stay, and so do other numbers in words.
    """
    for latex, ours in LATEX:
        text = latex.sub(ours, text)
    text = re.sub(
        f"([0-9]?)([{''.join(VULGAR)}])", lambda m: f"{m[1]} {VULGAR[m[2]]}".lstrip(), text
    )
    text = PART_IN_WORDS.sub(_write_part, text)
    return MINUS_IN_WORDS.sub("-", text)


def _write_part(found: re.Match[str]) -> str:
    """Write the part of `12 and a half` or `12 hours and a half` right behind the number."""
    count, part = COUNTS[found["count"].lower()], PARTS[found["part"].lower()]
    return f" {count}/{part}{found['unit'] or ''}"


def is_part(number: re.Match[str]) -> bool:
    r"""Tell whether a number is part of something else, as in `m2`, `\sqrt{2}`, `1st`, `3 * 4`.

    Args:
        number: What `NUMBER` matched.

    Returns:
        Whether what stands before or behind it makes it so.
    """
    text, before = number.string, number.string[: number.start()][-1:]
    return bool(re.match(r"[\w\\^{]", before) or GOES_ON.match(text, number.end()))


def read_number(text: str) -> Fraction | None:
    """Read a number exactly.

    Args:
        text: An integer, decimal, fraction or mixed number, perhaps with currency, alone.

    Returns:
        Its value, or `None` if the text is anything else.
    """
    number = NUMBER.fullmatch(text.strip())
    return None if number is None else value(number)


def is_same_number(answer: str, reference: str) -> bool:
    """Compare two numbers exactly, but for references that are decimals cut off.

    A reference with more than six decimals (`1.8333333333333335` for 11/6) stands for a fraction,
    and an answer within half a hundredth of it is right: `11/6`, `1 5/6`, `1.83`, not `1.8`.

    Args:
        answer: As `stated_number` gives it.
        reference: The right number.

    Returns:
        Whether they are the same.

    Raises:
        ValueError: If the reference is not a number.
    """
    right, given = read_number(reference), read_number(answer)
    if right is None:
        raise ValueError(f"`reference` must be a number, got {reference!r}.")
    if given is None:
        return False
    is_cut_off = len(reference.partition(".")[2]) > 6
    return abs(given - right) <= Fraction(1, 200) if is_cut_off else given == right


def is_close_number(answer: str, reference: str) -> bool:
    """Compare numbers as LLM-Adapters does: as floats, within 0.001.

    Args:
        answer: As `last_number` gives it.
        reference: The right number.

    Returns:
        Whether they are close.
    """
    return abs(float(reference) - float(answer)) <= CLOSE


def write(number: re.Match[str]) -> str:
    """Write what `NUMBER` matched without ornament; whole numbers without decimals.

    Args:
        number: The match.

    Returns:
        Its text without currency and thousands separators.
    """
    worth = value(number)
    if worth.denominator == 1:
        return str(worth.numerator)
    sign = "-" if worth < 0 else ""
    digits = re.search(r"[0-9.][0-9., /]*", number[0])
    assert digits is not None
    return sign + digits[0].replace(",", "")


def value(number: re.Match[str]) -> Fraction:
    """Compute what `NUMBER` matched.

    Args:
        number: The match.

    Returns:
        Its exact value, without currency.
    """
    if number["decimal"]:
        worth = Fraction(number["decimal"].replace(",", ""))
    else:
        worth = Fraction(int(number["numerator"]), int(number["denominator"]))
        worth += int(number["whole"] or 0)
    negative = (number["sign"] + number["inner_sign"]).strip("+")
    return -worth if negative else worth
