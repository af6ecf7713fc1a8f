"""What experiments need: their runs, which of them are missing, and about how long these take."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from depthmix.data.source_files import find_folders
from depthmix.evaluation.judge import JudgeSpec
from depthmix.files.settings import build_section
from depthmix.options.types import suggest
from depthmix_replication.estimate import Estimate, estimate
from depthmix_replication.experiment import Experiment, Scale
from depthmix_replication.experiment_files import list_experiments, load_experiment, load_subjects
from depthmix_replication.runs import TOY
from depthmix_replication.sizes import count_layers
from depthmix_replication.trials import Trial, expand, unique_runs
from depthmix_replication.workspace import Workspace, check_place

WORKSPACE = Path("reproduction")
"""Default folder of runs and results."""


RATING = ("model", "temperature", "max_tokens")
"""Options of a judge that determine its ratings."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which part of the experiments to run; empty fields leave out nothing."""

    models: tuple[str, ...] = ()
    """Models instead of the scale's."""

    seeds: tuple[int, ...] = ()
    """Training seeds instead of the scale's."""

    subjects: tuple[str, ...] = ()
    """Some of the experiments' subjects; experiments with none of them are left out."""

    def __post_init__(self) -> None:
        if wrong := [seed for seed in self.seeds if not 0 <= seed < 2**32]:
            raise ValueError(f"`seeds` must be from 0 to 4294967295, got {wrong[0]}.")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"`seeds` must differ, got {', '.join(map(str, self.seeds))}; a seed gives the "
                "same run each time."
            )


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """Experiments at one scale, with their runs."""

    scale: Scale
    workspace: Workspace
    trials: Mapping[str, tuple[Experiment, tuple[Trial, ...]]] = field(default_factory=dict)
    """Experiments and their trials by name."""

    judge: Mapping[str, Any] | None = None
    """Options of the judge."""

    data_dir: str | None = None
    """Local folder of data sets."""

    @property
    def runs(self) -> dict[str, Any]:
        """All runs, each once, with the ways to read them."""
        return unique_runs(trial for _, trials in self.trials.values() for trial in trials)

    def __str__(self) -> str:
        """List the runs, which of them are finished, and about how long the others take."""
        lines, missing = [], []
        names: dict[str, list[str]] = {}
        for experiment, trials in self.trials.values():
            for trial in trials:
                text = f"{trial.model}, {trial.subject}, {trial.label}, seed {trial.seed}"
                names.setdefault(trial.run.key, [text, experiment.name])
                if experiment.name not in names[trial.run.key]:
                    names[trial.run.key].append(experiment.name)
        for key, (run, readings) in self.runs.items():
            text, *experiments = names[key]
            left = self.workspace.missing(run, readings)
            trained = self.workspace.is_trained(run)
            state = "finished" if trained and not left else "to read" if trained else "to train"
            if state != "finished":
                missing.append((run, left))
            lines.append(f"{key}  {state:8}  {text}  ({', '.join(experiments)})")
        takes = f", {_say(estimate(self.workspace, missing))}" if missing else ""
        lines.append(f"{len(lines)} runs, {len(missing)} of them to do{takes}.")
        return "\n".join(lines)


def plan(
    experiments: Sequence[str],
    *,
    scale: Scale = "small",
    selection: Selection | None = None,
    workspace: Path = WORKSPACE,
    judge: Mapping[str, Any] | None = None,
    data_dir: str | None = None,
) -> Reproduction:
    """List what experiments need.

    Args:
        experiments: Names, TOML files, or `all`, which leaves out what needs a judge where there
            is none.
        scale: Models, data and training at this scale.
        selection: Which part of them.
        workspace: Folder of runs.
        judge: Options of the judge, for judged benchmarks. Another judge is another evaluation.
        data_dir: Local folder of data sets.

    Returns:
        The experiments with their trials.

    Raises:
        ValueError: If a name or an option is unknown, two experiments have one name, or nothing is
            left to do.
        OSError: If a model cannot be found, the workspace cannot be a folder, or the data sets'
            folder is none.
    """
    check_place("workspace", workspace)
    if data_dir is not None:
        find_folders(data_dir)  # refuses what is none
    chosen = selection or Selection()
    if scale == TOY and chosen.models:
        raise ValueError("`model` must be left out at the scale toy, which makes its own.")
    if unknown := [name for name in chosen.subjects if name not in load_subjects()]:
        raise ValueError(
            f"`subjects` must be known ones, and {unknown[0]} is none"
            f"{suggest(unknown[0], load_subjects())}"
        )
    section = None if judge is None else build_section("judge", judge, JudgeSpec)
    rating = None if section is None else {name: getattr(section, name) for name in RATING}
    names = [
        name for one in experiments for name in (list_experiments() if one == "all" else [one])
    ]
    found = {}
    for name in dict.fromkeys(names):
        experiment = load_experiment(name, scale)
        load_experiment(name, "paper")  # pages compare with it: a mistake is told before the runs
        subjects = tuple(s for s in experiment.subjects if s in chosen.subjects)
        if chosen.subjects and not subjects:
            if name in experiments:
                print(
                    f"{name} is left out, since it has other subjects: "
                    f"{', '.join(experiment.subjects)}",
                    file=sys.stderr,
                )
            continue
        trials = expand(
            experiment,
            scale,
            models=chosen.models,
            seeds=chosen.seeds,
            subjects=subjects,
            judge=rating,
            data_dir=data_dir,
            count_layers=count_layers,
        )
        if name not in experiments and judge is None and needs_judge(trials):
            print(
                f"{name} is left out, since a judge rates its answers; name one by `judge.model`",
                file=sys.stderr,
            )
            continue
        if experiment.name in found:
            raise ValueError(
                f"`experiments` must have names of their own, since each has a folder of results, "
                f"and {found[experiment.name][0].source} and {name} are both {experiment.name}; "
                "rename one of the files."
            )
        found[experiment.name] = experiment, tuple(trials)
    if not found:
        raise ValueError(
            "`experiments` must name at least one whose subjects are asked for; `all` stands for "
            "every one."
        )
    return Reproduction(
        scale=scale,
        workspace=Workspace(workspace),
        trials=found,
        judge=judge,
        data_dir=data_dir,
    )


def needs_judge(trials: Sequence[Trial]) -> bool:
    """Tell whether a judge rates answers in any of the trials."""
    return any(trial.reading.is_judged for trial in trials)


def _say(found: Estimate | None) -> str:
    """Say about how long runs take, and what that rests on."""
    if found is None:
        return "which take an unknown time"
    return f"about {_duration(found.seconds)} one after the other ({found})"


def _duration(seconds: float) -> str:
    """Write a rough duration."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"
