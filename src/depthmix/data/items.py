"""Choices of evaluation records: texts to be weighed against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def check_choices(records: Sequence[Mapping[str, Any]], source: str) -> None:
    """Check that each list of choices holds texts, whose likelihoods can be compared.

    Args:
        records: Evaluation records; what has no list of choices is left to the metric.
        source: Where they come from, for messages.

    Raises:
        ValueError: If a list is empty, or holds an empty text or something else.
    """
    for number, record in enumerate(records, start=1):
        choices = record.get("choices")
        if isinstance(choices, list) and not (
            choices and all(isinstance(choice, str) and choice.strip() for choice in choices)
        ):
            raise ValueError(
                "`choices` must be a list of texts with something in each, one of which continues "
                f"the prompt, and record {number} of {source} has {choices!r:.80}; fill them in, "
                "or remove the record."
            )
