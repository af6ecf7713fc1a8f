"""What a comparison says, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from depthmix.comparison.recovery import Recovery
from depthmix.evaluation.samples import LOSSES
from depthmix.files.html import to_html
from depthmix.statistics.intervals import Interval, PairedDifference
from depthmix.statistics.overlaps import Disagreement, Overlap

AVERAGE = "average"
"""Stands for all tasks together, each with the same weight: the paper's column Avg."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """What is compared: the runs of one method, which differ in their training seed."""

    label: str
    """Name of the method in the table."""

    folders: tuple[Path, ...]
    """Folders of the runs' evaluations."""

    seeds: tuple[int, ...]
    """Training seeds of the runs."""

    model: str
    """The pretrained model."""

    protocol: str
    """How questions were put and answers read."""

    dtype: str | None
    """Number type of the weights; `None` if unknown."""


@dataclass(frozen=True, kw_only=True)
class MethodScore:
    """How one method did on a task."""

    method: str
    """Label of the method."""

    mean: float
    """Mean score over items and seeds, from 0 to 1; or mean loss, in nats per token."""

    interval: Interval
    """95 % interval of `mean`, over other items of the same kind and, with several seeds, other
    seeds."""

    num_seeds: int
    """Seeds that were evaluated; of an average, the smallest number over its tasks."""

    seed_means: tuple[float, ...]
    """Mean score of each seed; of an average, empty if the tasks do not have the same runs."""

    difference: PairedDifference | None = None
    """From the baseline; `None` for the baseline itself."""

    adjusted_p_value: float | None = None
    """The difference's p-value after Holm's correction over all tests of the comparison."""


@dataclass(frozen=True, kw_only=True)
class TaskComparison:
    """All methods on one task, or on the average of the tasks."""

    task: str
    """The task's name, or `average`."""

    metric: str
    """lm-eval's name of the metric and its filter; of an average, of all its tasks."""

    num_items: int
    """Items with a rating in every run; of an average, the sum over its tasks."""

    num_left_out: int
    """Items without a rating in at least one run; of an average, the sum over its tasks."""

    scores: tuple[MethodScore, ...]
    """One per method, the baseline first."""

    blind_score: float | None = None
    """What can be scored without reading the items, from 0 to 1: by guessing among the choices, or
    by the answer that turns out to be commonest, whichever is more. `None` for an average, where
    answers are not known, and for scores other than right and wrong."""

    overlaps: tuple[Overlap, ...] = ()
    """One per set of methods with at least one item of its own; together they are all items. Empty
    for an average, and for scores other than right and wrong."""

    disagreements: tuple[Disagreement, ...] = ()
    """Disagreements of the seeds of each method and of each pair of methods; empty where overlaps
    are."""

    @property
    def is_loss(self) -> bool:
        """Whether the numbers are losses in nats per token, of which less is better."""
        return self.metric.partition(",")[0] in LOSSES


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Methods compared with the first of them, on each task and on average."""

    methods: tuple[Method, ...]
    """What is compared, the baseline first."""

    tasks: tuple[TaskComparison, ...]
    """The comparison on each task."""

    average: TaskComparison | None
    """That of the unweighted mean over the tasks with scores from 0 to 1; `None` for fewer than
    two of them."""

    num_tests: int
    """Tests that Holm's correction accounts for: every difference in the comparison."""

    recoveries: tuple[Recovery, ...] = ()
    """For each gap that was asked for, the share that a method recovers on each row."""

    @property
    def rows(self) -> tuple[TaskComparison, ...]:
        """The tasks, and their average if there is one."""
        return self.tasks if self.average is None else (*self.tasks, self.average)

    def _repr_html_(self) -> str:
        """Show the table of scores in a notebook, with its notes."""
        from depthmix.comparison.notes import notes
        from depthmix.comparison.tables import score_table

        table = score_table(self)
        return to_html(table.header, chain(*table.groups), notes=notes(self))
