"""The items of an evaluation in words: what was asked, what is right, what was answered."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from depthmix.evaluation.earlier import PROTOCOL as EARLIER
from depthmix.evaluation.result import EvaluationResult
from depthmix.evaluation.samples import Item, read_items


@dataclass(frozen=True, kw_only=True)
class Wording:
    """An item in words."""

    prompt: str
    """What the model read."""

    reference: str
    """The right answer."""

    response: str
    """What the model answered."""

    prompt_ids: tuple[int, ...] | None = None
    """Tokens of the prompt where it was a rendered record; `None` for a text."""


def read_wordings(outcomes: EvaluationResult, items: Collection[Item]) -> dict[Item, Wording]:
    """Read what items ask, and what a model answered.

    Args:
        outcomes: An evaluation.
        items: Some of its items.

    Returns:
        Their texts.

    Raises:
        ValueError: If a text cannot be read.
        OSError: If a file is missing.
    """
    if outcomes.protocol == EARLIER:
        raise ValueError(
            f"{outcomes.folder} was trained by an earlier version, which kept no texts of its "
            "evaluation; evaluate it again."
        )
    metrics = {item[0]: task.metric for task in outcomes.tasks.values() for item in task.scores}
    wordings = {}
    for leaf in {item[0] for item in items}:
        metric = metrics[leaf].partition(" / ")[0]
        path = outcomes.folder / f"samples_{leaf}.jsonl"
        named = read_items(outcomes.folder, leaf, metric.rpartition(",")[2])
        try:
            wordings |= {item: _word(named[item], metric) for item in items if item[0] == leaf}
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"{path} must hold lm-eval's samples with their texts, and one lacks them "
                f"({error!r}); evaluate again."
            ) from error
    return wordings


def _word(sample: Mapping[str, Any], metric: str) -> Wording:
    """Put one of lm-eval's samples into words: a choice by likelihood, or generated text."""
    requests, target = sample["arguments"], sample["target"]
    first = target[0] if isinstance(target, list) and target else target  # of several right ones
    prompt = "\n\n".join(dict.fromkeys(str(request[0]) for request in requests))
    answers = sample["filtered_resps"]
    rendered = sample.get("doc", {}).get("prompt_ids")
    prompt_ids = None if rendered is None else tuple(rendered)
    if len(requests) > 1 and all(isinstance(answer, list) for answer in answers):
        choices = [str(request[1]) for request in requests]
        scores = [answer[0] for answer in answers]
        if metric.startswith("acc_norm"):
            scores = [s / (len(c.strip()) or 1) for s, c in zip(scores, choices, strict=True)]
        elif metric.startswith("acc_bytes"):
            scores = [s / len(c.encode()) for s, c in zip(scores, choices, strict=True)]
        best = max(range(len(choices)), key=scores.__getitem__)
        reference = choices[first] if isinstance(first, int) else str(first)
        return Wording(
            prompt=prompt, reference=reference, response=choices[best], prompt_ids=prompt_ids
        )
    texts = [response[0] for response in sample["resps"]]
    reference = "" if first is None else str(first)  # a judge may need none
    response = "\n\n".join(map(str, texts))
    return Wording(prompt=prompt, reference=reference, response=response, prompt_ids=prompt_ids)
