"""What the finished runs of an experiment say, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from depthmix.comparison.scores import Comparison
from depthmix.evaluation.generation_speed import GenerationSpeed
from depthmix.evaluation.result import EvaluationResult
from depthmix.statistics.intervals import PairedDifference
from depthmix_replication.departures import Departure
from depthmix_replication.experiment import Experiment, Scale
from depthmix_replication.experiment_files import load_subjects


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method of an experiment, at one point of its axes: all its seeds and subjects."""

    label: str
    """Name of the method with its point."""

    point: Mapping[str, Any]
    """Value on each axis."""

    runs: tuple[str, ...]
    """Keys of its runs."""

    seeds: tuple[int, ...]
    """Training seeds."""

    trainable: int
    """Trained parameters; of several subjects, those of the first."""

    late_layers: tuple[int, ...]
    """Layers of the mixture, where it logs them; empty without one."""

    records: Mapping[str, int]
    """Records that a run trained on, by subject."""

    steps: Mapping[str, int]
    """Optimizer steps of a run, by subject."""

    seconds: float
    """Mean wall time of a run's training, with earlier starts where it was interrupted."""

    logs: Mapping[str, tuple[tuple[Mapping[str, Any], ...], ...]]
    """The trainers' logs by subject, one for each seed."""

    speeds: tuple[GenerationSpeed, ...]
    """Timed generation under this row's Top-K, one for each seed."""


@dataclass(frozen=True, kw_only=True)
class RunLog:
    """What one training run logged, and where it stands in the experiment."""

    run: str
    """Key of the run."""

    methods: tuple[str, ...]
    """Labels of the rows that it is read for."""

    subjects: tuple[str, ...]
    """Subjects that it is tuned for."""

    seed: int
    """Seed of the training."""

    entries: tuple[Mapping[str, Any], ...]
    """The trainer's log."""


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """The difference between two methods, neither of which is the baseline."""

    method: str
    """Label of the one whose gain it is."""

    other: str
    """Label of the other."""

    task: str
    """Task, or the average of several."""

    difference: PairedDifference
    """How much `method` exceeds `other`."""

    adjusted_p_value: float
    """The p-value after Holm's correction over all contrasts of the experiment."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What an experiment found on one model."""

    experiment: Experiment
    """What was asked."""

    scale: Scale
    """At which scale."""

    model: str
    """On which pretrained model."""

    subjects: tuple[str, ...]
    """What was tuned on."""

    rows: tuple[Row, ...]
    """Methods and points, the baseline first."""

    comparison: Comparison
    """Scores on the same items, with intervals and tests."""

    contrasts: tuple[Contrast, ...] = ()
    """Differences that the experiment asks for beside those from the baseline."""

    departures: tuple[Departure, ...] = ()
    """Settings that are not those of the paper's scale."""

    judge: Mapping[str, Any] | None = None
    """What of the judge determined its ratings, where there was one."""

    versions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Versions of the packages that trained and evaluated, by name."""

    logs: tuple[RunLog, ...] = ()
    """What each training run logged."""

    outcomes: Mapping[str, Sequence[EvaluationResult]] = field(default_factory=dict)
    """The evaluations of each row, with every item's score."""


def subject_title(name: str) -> str:
    """Give a subject's name for readers."""
    return load_subjects()[name].title
