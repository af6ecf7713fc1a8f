"""What an evaluation is: what was measured, and one score for every item.

On disk it is a folder, which `folder` writes and `reading` reads, for `depthmix evaluate` and
`depthmix train` alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from depthmix.evaluation.samples import LOSSES, Item, Reference
from depthmix.files.runs import RUN_CONFIG_NAME
from depthmix.statistics.intervals import Interval, mean_interval

TRAINING_NAME = "training"
"""Evaluation that `depthmix train` leaves in a run: `RUN/evaluation/training`."""

PRETRAINED_NAME = "pretrained"
"""Folder in a run that stands for the pretrained model as it was measured there."""


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """The scores of one task's items, in the order of the records."""

    metric: str
    """lm-eval's name of the metric and its filter, such as `acc_norm,none`."""

    scores: Mapping[Item, float]
    """A number from 0 to 1 for each item with a rating, 1 is right; or its loss (`is_loss`)."""

    references: Mapping[Item, Reference | None] = field(default_factory=dict)
    """The right answer to each item, where that is known."""

    unrated: frozenset[Item] = frozenset()
    """Items on which a judge gave no verdict."""

    num_fewshot: tuple[int, ...] = ()
    """Examples in the prompts, one number if all tasks of a group agree; empty if unknown."""

    data: Mapping[str, Any] = field(default_factory=dict)
    """What the scores depend on besides the model, such as the judge; empty if unknown."""

    measures: Mapping[str, float] = field(default_factory=dict)
    """Means of all metrics by their names; empty for a group of tasks."""

    @property
    def num_items(self) -> int:
        """Number of items with a rating."""
        return len(self.scores)

    @property
    def mean(self) -> float:
        """Mean over the items: of a score from 0 to 1, or of a loss in nats per token."""
        return sum(self.scores.values()) / self.num_items

    @property
    def interval(self) -> Interval:
        """95 % interval of the mean over other items of the same kind."""
        return mean_interval(np.array(list(self.scores.values())), are_losses=self.is_loss)

    @property
    def is_loss(self) -> bool:
        """Whether the scores are losses, of which less is better."""
        return self.metric.partition(",")[0] in LOSSES

    def __str__(self) -> str:
        """Say the mean with its interval: a share in percent, or a loss and its perplexity."""
        low, high = self.interval.low, self.interval.high
        if not self.is_loss:
            return f"{self.mean:.1%} right (95 % interval {low:.1%} to {high:.1%})"
        ends = f"95 % interval {low:.3f} to {high:.3f}, " if math.isfinite(low) else ""
        perplexity = math.exp(min(self.mean, 700.0))
        return f"{self.mean:.3f} nats per token ({ends}perplexity {perplexity:.4g})"


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """One evaluation: what was evaluated, and how it did."""

    folder: Path
    """Where it was read."""

    method: str
    """Label of the method."""

    model: str
    """The pretrained model."""

    protocol: str
    """How questions were put and answers read."""

    layer: int | str
    """Where the model was read out: `ensemble`, `final` or the number of a late layer."""

    seed: int
    """Training seed."""

    settings: str | None
    """Hash of the training's settings but for the seed; `None` if unknown or untuned."""

    adapter: str | None
    """Hash of the tuned weights; `None` if unknown or untuned."""

    dtype: str | None
    """Number type of the weights; `None` if unknown."""

    top_k: int | None
    """Routes per token that replaced the number it was trained with; `None` if none did."""

    tasks: Mapping[str, TaskResult]
    """The outcomes by task; a group whose tasks share a metric is one task."""

    @property
    def task(self) -> TaskResult:
        """The task of an evaluation that has only one, such as those of training."""
        (task,) = self.tasks.values()
        return task

    @property
    def run(self) -> Path:
        """Folder of the run that was evaluated, or of another model's evaluations."""
        is_run = (self.folder / RUN_CONFIG_NAME).is_file()
        return self.folder if is_run else self.folder.absolute().parents[1]
