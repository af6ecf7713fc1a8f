"""Where an experiment at one scale departs from the same experiment at the paper's scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from pydantic_core import to_jsonable_python
from trl import SFTConfig

from depthmix.adapters.config import MoDEConfig
from depthmix_replication.experiment import Experiment
from depthmix_replication.experiment_files import load_experiment, load_scale
from depthmix_replication.trials import Trial, expand

NO_RESULT = (
    "run.model.name",
    "run.model.revision",
    "run.training.seed",
    "run.training.logging_steps",
    "run.training.save_strategy",
    "run.training.report_to",
    "reading.batch_size",
    "reading.speed",
    "reading.whole",
)
"""Settings that change no result, or that are listed by themselves."""

OWNERS = {"run.mode": MoDEConfig, "run.training": SFTConfig}
"""Whose defaults hold where a section does not name an option."""


@dataclass(frozen=True, kw_only=True)
class Departure:
    """A setting that is not the paper's."""

    setting: str
    """`models`, `subjects`, an axis, `run.SECTION.OPTION` or `reading.OPTION`."""

    here: tuple[Any, ...]
    """Values of the setting in this experiment, in JSON's types; several where methods or
    subjects differ."""

    paper: tuple[Any, ...]
    """Values of the setting at the paper's scale."""


def list_departures(
    experiment: Experiment,
    trials: Sequence[Trial],
    *,
    count_layers: Callable[[str], int],
) -> tuple[Departure, ...]:
    """Compare trials with those of the same experiment at the scale `paper`.

    Settings are compared method by method, subject by subject and point by point, as they are after
    all presets and defaults; on a subject that the paper's scale does not have, with what they
    would be there. Which subjects and points either has is left to the lists of subjects and axes.

    Args:
        experiment: As it is at its scale; what it was loaded from must still be there.
        trials: Its trials on one model.
        count_layers: Gives the number of a model's layers, for settings such as `n-1`.

    Returns:
        One departure for each setting that differs anywhere; none at the paper's own scale.

    Raises:
        ValueError: If the experiment is damaged at the paper's scale.
    """
    paper = load_experiment(experiment.source, "paper")
    # With this model, whose layers are numbered as here, and on the same subjects.
    own = expand(
        replace(paper, subjects=tuple(dict.fromkeys(trial.subject for trial in trials))),
        "paper",
        models=[trials[0].model],
        seeds=[0],
        count_layers=count_layers,
    )
    axes = {axis.setting for axis in (*experiment.axes, *paper.axes)}
    known = {_name(trial): trial for trial in own}
    pairs = [(trial, known[_name(trial)]) for trial in trials if _name(trial) in known]
    found: dict[str, tuple[list[Any], list[Any]]] = {}
    for setting, here, there in _compare_lists(experiment, paper, trials):
        if here != there:
            found[setting] = here, there
    for one, other in pairs:
        here, there = _flatten(one), _flatten(other)
        for setting in [*here, *(name for name in there if name not in here)]:
            values = [
                side[setting] if setting in side else _find_default(setting)
                for side in (here, there)
            ]
            if values[0] != values[1] and setting not in (*NO_RESULT, *axes):
                for side, value in zip(found.setdefault(setting, ([], [])), values, strict=True):
                    if value not in side:
                        side.append(value)
    return tuple(
        Departure(setting=setting, here=tuple(here), paper=tuple(there))
        for setting, (here, there) in found.items()
    )


def _name(trial: Trial) -> tuple[Any, ...]:
    """Name a trial by what both scales have in common."""
    return trial.subject, trial.label


def _compare_lists(
    experiment: Experiment, paper: Experiment, trials: Sequence[Trial]
) -> Iterator[tuple[str, list[Any], list[Any]]]:
    """Set models, subjects and axes beside the paper's."""
    models = paper.models or load_scale("paper").models
    yield "models", list(dict.fromkeys(trial.model for trial in trials)), list(models)
    subjects = list(dict.fromkeys(trial.subject for trial in trials))
    yield "subjects", subjects, list(paper.subjects)
    axes: list[dict[str, str]] = []
    for owner in (experiment, paper):
        axes.append({axis.name: f"{axis.setting} = {[*axis.values]}" for axis in owner.axes})
    for name in dict.fromkeys([*axes[0], *axes[1]]):
        here, there = ([side[name]] if name in side else [] for side in axes)
        yield name, here, there


def _flatten(trial: Trial) -> dict[str, Any]:
    """Name each setting of a trial by its place."""
    sections = {"run": trial.run.settings, "reading": asdict(trial.reading)}
    return dict(_walk(to_jsonable_python(sections), ""))


def _walk(settings: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _walk(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _find_default(setting: str) -> Any:
    """Find what holds where a section does not name an option."""
    section, _, option = setting.rpartition(".")
    owner = OWNERS.get(section)
    defaults = {} if owner is None else {one.name: one.default for one in fields(owner)}
    return to_jsonable_python(defaults.get(option), fallback=lambda _: None)
