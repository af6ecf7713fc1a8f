"""When a generated answer is right."""

from __future__ import annotations

import re
from decimal import Decimal

NUMBER = re.compile(r"((?<![\w)])-)?\$?([0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(\.[0-9]+)?")
"""A decimal number: `-3`, `1,234.50`, `$7`. The hyphen of `5-3` is not a sign."""

END_OF_RESPONSE = re.compile(r"\n\s*\n|\n\s*Question:")


def is_correct(response: str, answer: str) -> bool:
    """Judge a generated response by the reference answer.

    Only the text before the first blank line or the next `Question:` counts. If the answer is a
    number, the last number of that text must equal it: `$1,200.00` equals `1200`. Otherwise what
    follows the last `answer is` (or the whole text) must be the answer, but for case, outer
    whitespace and a final full stop.

    Args:
        response: Text that the model generated.
        answer: Reference.

    Returns:
        Whether they agree.
    """
    text = END_OF_RESPONSE.split(response.strip(), maxsplit=1)[0]
    if reference := NUMBER.fullmatch(answer.strip()):
        numbers = list(NUMBER.finditer(text))
        return bool(numbers) and _value(numbers[-1]) == _value(reference)
    return _plain(text.rpartition("answer is")[2]) == _plain(answer)


def _value(number: re.Match[str]) -> Decimal:
    """Read what `NUMBER` matched."""
    sign, whole, fraction = (group or "" for group in number.groups())
    return Decimal(sign + whole.replace(",", "") + fraction)


def _plain(text: str) -> str:
    """Drop what does not matter in a comparison of texts."""
    return " ".join(text.casefold().split()).removesuffix(".").strip()
