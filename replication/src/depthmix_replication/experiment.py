"""An experiment as data: what is tuned on what, how the runs are read, and what is shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from depthmix.options.types import suggest

Scale = Literal["paper", "small", "toy"]
"""`paper`: the paper's models and data. `small`: a small model on a CPU. `toy`: a test."""

Shows = Literal["scores", "overlaps", "curves", "grid", "speed"]
"""What is made of an experiment's runs: a table of scores, who solves what, curves over training,
a map over two axes, or speed and accuracy."""

Quantity = Literal["layer_loss", "routing_weight", "routing_variance", "routing_sparsity"]
"""What is logged for each late layer, and drawn over training."""

DECIDED = {
    "run.model.name": "`models` says it, or `model`",
    "run.training.seed": "`seeds` says it",
    "run.training.output_dir": "each run has its own folder in the workspace",
    "run.training.hub_token": "settings are written down; log in by `hf auth login` instead",
}
"""Settings of a run that an experiment may not hold, and what decides them."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a model is tuned on, and the tests that it then takes."""

    title: str
    """Name for readers."""

    train: str
    """Named data set to tune on."""

    tasks: tuple[str, ...]
    """Named benchmarks."""

    toy: Literal["choices", "numbers"]
    """Invented records that stand for all of that in a test of the machinery."""

    reading: Mapping[str, Any] = field(default_factory=dict)
    """How these tests are taken, where that differs from the scale's way."""

    departures: tuple[str, ...] = ()
    """In what the data are not the paper's, but for a test of the machinery."""


@dataclass(frozen=True, kw_only=True)
class ScaleSettings:
    """What all experiments of one scale have in common."""

    models: tuple[str, ...]
    """Models as `model.name` takes them."""

    seeds: tuple[int, ...]
    """Training seeds."""

    revisions: Mapping[str, str] = field(default_factory=dict)
    """Commits on the hub of models that are there."""

    run: Mapping[str, Any] = field(default_factory=dict)
    """Sections of a run's settings."""

    reading: Mapping[str, Any] = field(default_factory=dict)
    """How finished runs are evaluated."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of a table: how a model is tuned, and how it is read."""

    name: str
    """Name for readers."""

    run: Mapping[str, Any] = field(default_factory=dict)
    """Sections of a run's settings that make the method."""

    reading: Mapping[str, Any] = field(default_factory=dict)
    """How its runs are evaluated, where that differs."""

    untuned: bool = False
    """Whether the pretrained model itself is read."""

    beside: tuple[str, ...] = ()
    """Further methods, besides the baseline, that it is to be compared with."""

    recovers: tuple[str, str] | None = None
    """Two methods of whose gap, from the first to the second, it may recover a share."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A setting that takes several values."""

    name: str
    """Name for readers."""

    setting: str
    """Where the value goes: `run.SECTION.OPTION` or `reading.OPTION`."""

    values: tuple[Any, ...]
    """The values."""

    def __post_init__(self) -> None:
        if self.setting.partition(".")[0] not in ("run", "reading"):
            raise ValueError(
                f"`setting` of the axis {self.name} must begin with `run.` or `reading.`, got "
                f"{self.setting!r}."
            )


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A table or figure: every method on every subject, with every value of every axis."""

    name: str
    """Name of its file, and of its folder of results."""

    source: str = ""
    """What it was asked for by: its name, or the path of its file."""

    title: str
    """Heading."""

    claims: tuple[str, ...]
    """What the paper says that it shows, or what it leaves open."""

    shows: Shows
    """What is made of the runs."""

    subjects: tuple[str, ...]
    """Names of subjects."""

    methods: tuple[Method, ...]
    """The first one is the baseline."""

    axes: tuple[Axis, ...] = ()
    """Settings that take several values; all combinations are run."""

    run: Mapping[str, Any] = field(default_factory=dict)
    """Settings of all runs, beside those of the scale."""

    reading: Mapping[str, Any] = field(default_factory=dict)
    """How all runs are evaluated, beside what the scale says."""

    quantities: tuple[Quantity, ...] = ()
    """What the curves are of."""

    moving_average: int = 1
    """Logged values that one point of a curve averages."""

    models: tuple[str, ...] = ()
    """Models; empty takes those of the scale."""

    seeds: tuple[int, ...] = ()
    """Training seeds; empty takes those of the scale."""

    def __post_init__(self) -> None:
        if all(method.untuned for method in self.methods):
            raise ValueError(f"`methods` of {self.name} must hold one that tunes a model.")
        names = [method.name for method in self.methods]
        others = [other for method in self.methods for other in method.beside]
        others += [other for method in self.methods for other in method.recovers or ()]
        if unknown := [other for other in others if other not in names]:
            raise ValueError(
                f"`beside` and `recovers` must name methods of {self.name}, and {unknown[0]} is "
                f"none{suggest(unknown[0], names)}"
            )
        if self.shows == "grid" and (len(self.axes), len(self.methods)) != (2, 1):
            raise ValueError(
                f"`axes` of {self.name} must be two, for one method, since it shows a grid, got "
                f"{len(self.axes)} for {len(self.methods)}."
            )
        if bool(self.quantities) != (self.shows == "curves"):
            raise ValueError(f"`quantities` of {self.name} must be given for curves, and only so.")
        if self.moving_average != 1 and self.shows != "curves":
            raise ValueError(f"`moving_average` of {self.name} is for curves; leave it out.")
        self._refuse_what_would_be_replaced()
        if bool(self.reading.get("speed")) != (self.shows == "speed"):
            raise ValueError(
                f"`reading.speed` of {self.name} must be given to show speed, and only so."
            )

    def _refuse_what_would_be_replaced(self) -> None:
        """Check that no setting stands where another one, or nothing, decides."""
        taken = [axis.setting for axis in self.axes]
        for sections in (self.run, *(method.run for method in self.methods)):
            for section, options in sections.items():
                names = options if isinstance(options, Mapping) else ()
                taken += [f"run.{section}.{option}" for option in names]
        if found := [setting for setting in taken if setting in DECIDED]:
            raise ValueError(
                f"`{found[0]}` must be left out of {self.name}, since {DECIDED[found[0]]}."
            )
        for method in self.methods:
            if method.untuned and set(method.run) - {"model"}:
                raise ValueError(
                    f"`run` of {method.name} must name nothing but `model`, since it is untuned."
                )
