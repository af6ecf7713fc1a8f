"""lm-eval's samples of one task: a score for every item."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

LOSSES = ("nll",)
"""Metrics in nats per token, of which less is better; all others are scores from 0."""

Item = tuple[str, str, int]
"""Task, hash of the document, and which of several equal documents it is, by `doc_id`."""


class Reference(NamedTuple):
    """The right answer to an item."""

    text: str
    """The right choice, or what is to be written."""

    num_choices: int | None
    """Among how many it is chosen; `None` where the model writes freely."""


def choose_metric(metric: str, samples: Sequence[Mapping[str, Any]], where: str) -> str:
    """Complete a metric by its filter, and check that the samples have it."""
    keys = {
        f"{name},{sample['filter']}": None for sample in samples for name in sample["metrics"]
    }  # a dict keeps their order
    found = [key for key in keys if metric in (key, key.rpartition(",")[0])]
    if len(found) != 1:
        raise ValueError(
            f"`metric` must name one metric of every task, and {metric} names "
            f"{len(found) or 'none'} in {where}; it has {' '.join(keys)}."
        )
    return found[0]


def score_items(
    items: Mapping[Item, Mapping[str, Any]], metric: str, folder: Path, *, highest: float
) -> dict[Item, float | None]:
    """Read every item's score, or None where a judge gave none; `name_items` gives the items."""
    name = metric.rpartition(",")[0]
    scores: dict[Item, float | None] = {}
    for item, sample in items.items():
        score = sample.get(name)
        if score is not None and name in LOSSES and isinstance(score, int | float):
            scores[item] = score
            continue
        if score is not None and not (isinstance(score, int | float) and 0 <= score <= highest):
            raise ValueError(
                f"`metric` must give every item a number from 0 to {highest:g}, and {metric} is "
                f"{score!r:.40} for item {sample['doc_id']} of {item[0]} in {folder}; choose "
                "another by `metric`."
            )
        scores[item] = None if score is None else score / highest
    return scores


def name_items(
    task: str, filter_name: str, samples: Iterable[Mapping[str, Any]], folder: Path
) -> dict[Item, Mapping[str, Any]]:
    """Name every item of a task by its document; `filter_name` is one of lm-eval's filters."""
    chosen = [sample for sample in samples if sample["filter"] == filter_name]
    chosen.sort(key=lambda sample: sample["doc_id"])
    for earlier, later in pairwise(chosen):
        if earlier["doc_id"] == later["doc_id"]:
            raise ValueError(
                f"Each item must be judged once, and {task} in {folder} has item "
                f"{later['doc_id']} twice; evaluate it again."
            )
    seen: Counter[str] = Counter()
    items = {}
    for sample in chosen:
        items[task, sample["doc_hash"], seen[sample["doc_hash"]]] = sample
        seen[sample["doc_hash"]] += 1
    return items


def read_items(folder: Path, task: str, filter_name: str) -> dict[Item, Mapping[str, Any]]:
    """Read the items of a task with their texts, as `name_items` names them."""
    samples = read_samples(folder / f"samples_{task}.jsonl", texts=True)
    return name_items(task, filter_name, samples, folder)


def find_reference(sample: Mapping[str, Any]) -> Reference | None:
    """Find the right answer to an item, or None where lm-eval's sample does not say it plainly."""
    match sample:
        # A request is a prompt and its continuation, or how one is generated.
        case {"target": str(text), "arguments": [[_, {}]]}:
            return Reference(text, None)
        case {"target": int(number), "arguments": list(requests)}:
            choices = [request[1] for request in requests if len(request) > 1]
            is_choice = len(choices) == len(requests) and all(isinstance(c, str) for c in choices)
            if is_choice and 0 <= number < len(choices):
                return Reference(choices[number], len(choices))
    return None


TEXTS = ("doc", "arguments", "resps", "filtered_resps")
"""Parts of a sample that are long, and that scores do not need."""


def read_samples(path: Path, *, texts: bool = False) -> list[dict[str, Any]]:
    """Read lm-eval's samples, with or without their long texts, and each one's `reference`."""
    if not path.is_file():
        raise FileNotFoundError(
            f"Cannot find {path}, which `depthmix evaluate` writes; the evaluation did not finish."
        )
    unused = () if texts else TEXTS
    samples = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                sample = json.loads(line)
                missing = {"doc_id", "doc_hash", "filter", "metrics"} - set(sample)
            except (ValueError, TypeError) as error:
                raise ValueError(f"Cannot read line {number} of {path}: {error}.") from error
            if missing:
                raise ValueError(
                    f"Line {number} of {path} must be one of lm-eval's samples, and lacks "
                    f"{', '.join(sorted(missing))}; evaluate again."
                )
            kept = {key: value for key, value in sample.items() if key not in unused}
            samples.append(kept | {"reference": find_reference(sample)})
    if not samples:
        raise ValueError(f"{path} must hold at least one item, and is empty; evaluate again.")
    return samples
