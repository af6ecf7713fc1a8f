"""An evaluation whose items a judge has rated: means with intervals, and lm-eval's form of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from depthmix.files.drafts import write_whole
from depthmix.statistics.intervals import Interval


@dataclass(frozen=True, kw_only=True)
class Mean:
    """The mean of one metric over the items that have a rating."""

    value: float | None
    """In the unit of the metric; `None` if no item is rated."""

    interval: Interval | None
    """By the percentile bootstrap over items; `None` if all ratings are alike, which resampling
    would take for certainty."""

    standard_error: float | None
    """Standard error of the mean; `None` for fewer than two ratings."""

    num_rated: int
    """Items with a rating."""

    num_unrated: int
    """Items on which the judge gave no rating, however often it was asked."""


@dataclass(frozen=True, kw_only=True)
class JudgedEvaluation:
    """The outcome of a judged benchmark."""

    task: str
    """Name of the benchmark."""

    metrics: Mapping[str, Mean]
    """Means by name of the metric."""

    samples: tuple[Mapping[str, Any], ...]
    """One per item, as `make_sample` makes them."""

    settings: Mapping[str, Any]
    """What determines the outcome, in JSON's types; without the judge's key."""

    def to_harness(self) -> dict[str, Any]:
        """Write the outcome as the dictionary that `lm_eval.evaluate` returns.

        Returns:
            `results` (also with `<metric>_interval` and `<metric>_unrated`), `configs`, `versions`,
            `n-shot`, `n-samples`, `higher_is_better`, and `samples` by task.
        """
        results: dict[str, Any] = {"alias": self.task}
        for name, mean in self.metrics.items():
            ends = mean.interval
            results[f"{name},none"] = mean.value
            results[f"{name}_stderr,none"] = mean.standard_error
            results[f"{name}_interval,none"] = None if ends is None else [ends.low, ends.high]
            results[f"{name}_unrated,none"] = mean.num_unrated
        num_items = len(self.samples)
        return {
            "results": {self.task: results},
            "configs": {self.task: {"task": self.task, "metadata": dict(self.settings)}},
            "versions": {self.task: 1.0},
            "n-shot": {self.task: 0},
            "n-samples": {self.task: {"original": num_items, "effective": num_items}},
            "higher_is_better": {self.task: dict.fromkeys(self.metrics, True)},
            "samples": {self.task: [dict(sample) for sample in self.samples]},
        }

    def save_samples(self, directory: Path) -> Path:
        """Write the samples, one JSON line each.

        Args:
            directory: Folder of the evaluation; made if missing.

        Returns:
            The written file, `samples_<task>.jsonl`.
        """
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"samples_{self.task}.jsonl"
        lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in self.samples]
        return write_whole(path, "".join(lines))


def mean_rating(ratings: Sequence[float | None], *, seed: int = 0) -> Mean:
    """Average ratings, leaving out items without one.

    Args:
        ratings: One per item; `None` where there is none.
        seed: Of the 9999 resamples.

    Returns:
        Mean, 95 % interval and counts.
    """
    rated = np.array([rating for rating in ratings if rating is not None], dtype=float)
    interval = None
    if np.unique(rated).size > 1:
        ends = stats.bootstrap(
            (rated,), np.mean, batch=256, method="percentile", rng=seed
        ).confidence_interval
        interval = Interval(float(ends.low), float(ends.high))
    return Mean(
        value=float(rated.mean()) if rated.size else None,
        interval=interval,
        standard_error=float(stats.sem(rated)) if rated.size > 1 else None,
        num_rated=int(rated.size),
        num_unrated=len(ratings) - int(rated.size),
    )


def make_sample(
    doc_id: int,
    record: Mapping[str, Any],
    *,
    target: Any,
    prompts: Sequence[str],
    answers: Sequence[str],
    judgments: Mapping[str, str],
    ratings: Mapping[str, float | None],
) -> dict[str, Any]:
    """Write one item as lm-eval logs it, with what the judge said.

    Args:
        doc_id: Number of the item in its data set, from 0.
        record: The item.
        target: Reference, in JSON's types.
        prompts: What the model was given, one per turn.
        answers: What it answered, one per turn.
        judgments: Texts of the judge by metric.
        ratings: Values by metric. Those that are `None` are left out of the sample.

    Returns:
        The sample.
    """
    rated = {name: value for name, value in ratings.items() if value is not None}
    text = json.dumps(record, indent=2, default=str, ensure_ascii=False)
    return {
        "doc_id": doc_id,
        "doc": dict(record),
        "target": target,
        "arguments": [[prompt] for prompt in prompts],
        "resps": [[answer] for answer in answers],
        "filtered_resps": list(answers),
        "filter": "none",
        "metrics": list(rated),
        "doc_hash": sha256(text.encode()).hexdigest(),
        "judgments": dict(judgments),
        **rated,
    }
