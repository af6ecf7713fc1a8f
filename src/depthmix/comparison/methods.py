"""Which runs make one method, and whether methods can be compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from depthmix.comparison.folders import find_evaluation
from depthmix.evaluation.reading import list_tasks, load_evaluation, printable
from depthmix.evaluation.result import EvaluationResult

ASPECTS = {
    "model": "model",
    "protocol": "protocol",
    "layer": "layer",
    "dtype": "dtype",
    "top_k": "top_k",
}
"""What the runs of one method have in common, and how an error calls it."""

ASPECTS_OF_SEEDS = {"settings": "training settings with the hash"}
"""What its runs with the same task have in common as well: there may be a run for each task."""

UNKNOWN_IF_NONE = ("settings", "dtype")
"""Aspects that older evaluations do not tell, where `None` says nothing."""


def read_methods(
    runs: Sequence[str | Path],
    *,
    tasks: Sequence[str] | None = None,
    metric: str | None = None,
) -> dict[str, list[EvaluationResult]]:
    """Read evaluations, and gather them by the label of their method.

    Args:
        runs: Folders, or `NAME=RUN,RUN,…`.
        tasks: Tasks to read from the runs that have them; `None` reads all.
        metric: Metric of all tasks, as `load_evaluation` takes it.

    Returns:
        The runs of each method, in the order in which they come.

    Raises:
        ValueError: If there are no runs, none has one of the tasks, or those of a method have
            different models, protocols, layers, dtypes or numbers of routes.
        OSError: If a folder holds no evaluation.
    """
    methods: dict[str, list[EvaluationResult]] = {}
    known: dict[str, None] = {}  # keeps the order
    for run in runs:
        name, folders = _parse_run(run)
        for folder in folders:
            found = find_evaluation(folder)
            available = list_tasks(found)
            known |= dict.fromkeys(available)
            # A method may have one run for each task.
            there = None if tasks is None else [task for task in tasks if task in available]
            outcomes = load_evaluation(found, tasks=there, metric=metric)
            methods.setdefault(name or label_outcomes(outcomes), []).append(outcomes)
    if not methods:
        raise ValueError("`runs` must name at least one evaluation, got none.")
    if unknown := [task for task in tasks or () if task not in known]:
        raise ValueError(
            f"`tasks` must be tasks of the runs, and none of them has {', '.join(unknown)}; they "
            f"have {', '.join(known)}."
        )
    for label, outcomes in methods.items():
        _check_one_method(label, outcomes, ASPECTS)
    return methods


def choose_runs(
    methods: Mapping[str, Sequence[EvaluationResult]], task: str
) -> dict[str, tuple[EvaluationResult, ...]]:
    """Choose each method's runs with a task, and check that they can be compared on it.

    Args:
        methods: Runs by method.
        task: A task of at least one of them.

    Returns:
        At least one run for each method.

    Raises:
        ValueError: If a method has no run with the task, two of the same seed or with different
            settings, or the runs have different items, metrics, numbers of examples, data or
            judges.
    """
    chosen = {
        label: tuple(run for run in outcomes if task in run.tasks)
        for label, outcomes in methods.items()
    }
    first = next(run for outcomes in chosen.values() for run in outcomes)
    for label, outcomes in chosen.items():
        if not outcomes:
            raise ValueError(
                f"`runs` must all have the same tasks, and {label} lacks {task}, which "
                f"{first.folder} has; evaluate it, or choose common tasks by `tasks`."
            )
        _check_one_method(label, outcomes, ASPECTS_OF_SEEDS)
        by_seed: dict[int, EvaluationResult] = {}
        for run in outcomes:
            if (other := by_seed.setdefault(run.seed, run)) is not run:
                raise ValueError(
                    f"`runs` of one method must differ in their seed, and {other.folder} and "
                    f"{run.folder} of {label} both have seed {run.seed} on {task}; leave one out, "
                    "or name them apart, as `NAME=RUN`."
                )
            check_comparable(first, run, task)
    return chosen


def check_comparable(first: EvaluationResult, other: EvaluationResult, task: str) -> None:
    """Check that two evaluations judged the same items of a task alike.

    Args:
        first: One evaluation.
        other: Another.
        task: A task that both have.

    Raises:
        ValueError: If they have different items, metrics, numbers of examples, data or judges.
    """
    _check_same_items(first, other, task)
    _check_same_conditions(first, other, task)


def label_outcomes(outcomes: EvaluationResult) -> str:
    """Name an evaluation by its method, and by the layer where one was read out."""
    if outcomes.layer == "ensemble":
        return outcomes.method
    if outcomes.layer == "final":
        return f"{outcomes.method}, final layer"
    return f"{outcomes.method}, layer {outcomes.layer}"


def _parse_run(run: str | Path) -> tuple[str | None, list[Path]]:
    """Split `NAME=RUN,RUN,…`, whose parts may hold the same signs, at the sign that makes sense."""
    text = str(run)
    if Path(text).expanduser().exists() or "=" not in text:
        return None, [Path(text)]
    parts = text.split("=")
    splits = [
        ("=".join(parts[:end]), [Path(p) for p in "=".join(parts[end:]).split(",")])
        for end in range(1, len(parts))
    ]
    name, folders = next(
        (split for split in splits if all(path.expanduser().exists() for path in split[1])),
        splits[0],
    )
    if not printable(name):
        raise ValueError(
            f"`runs` must have a name before the equals sign, got {text!r}; write `NAME=RUN`."
        )
    return printable(name), folders


def _check_one_method(
    label: str, outcomes: Sequence[EvaluationResult], aspects: Mapping[str, str]
) -> None:
    """Check that runs of one label have the same value of each aspect."""
    for aspect, name in aspects.items():
        values = {
            Path(str(value)).name: run.folder
            for run in outcomes
            if (value := getattr(run, aspect)) is not None or aspect not in UNKNOWN_IF_NONE
        }
        if len(values) > 1:
            raise ValueError(
                f"`runs` of one method must differ in nothing but the seed, and those of "
                f"{label} have the {name} {' and '.join(values)}, in "
                f"{' and '.join(map(str, values.values()))}; name them apart, as `NAME=RUN`."
            )


def _check_same_items(first: EvaluationResult, other: EvaluationResult, task: str) -> None:
    """Check that two evaluations judged the same items by the same metric."""
    ours, theirs = first.tasks[task], other.tasks[task]
    if ours.metric != theirs.metric:
        raise ValueError(
            f"`metric` must be one for all runs, and on {task} {first.folder} has {ours.metric} "
            f"and {other.folder} {theirs.metric}; choose one by `metric`."
        )
    items, others = ours.scores.keys() | ours.unrated, theirs.scores.keys() | theirs.unrated
    if items != others:
        raise ValueError(
            f"`runs` must have judged the same items, and on {task} {other.folder} lacks "
            f"{len(items - others)} of the {len(items)} items of {first.folder} and has "
            f"{len(others - items)} others; evaluate both on the same records."
        )


def _check_same_conditions(first: EvaluationResult, other: EvaluationResult, task: str) -> None:
    """Check that two evaluations gave as many examples, and used the same data and judge."""
    ours, theirs = first.tasks[task], other.tasks[task]
    known = bool(ours.num_fewshot and theirs.num_fewshot)
    if known and ours.num_fewshot != theirs.num_fewshot:
        pairs = [("num_fewshot", *(" and ".join(map(str, t.num_fewshot)) for t in (ours, theirs)))]
    else:
        pairs = list(_find_differences(ours.data, theirs.data))
    if pairs:
        aspect, value, other_value = pairs[0]
        raise ValueError(
            f"`runs` must be evaluated alike, and on {task} {first.folder} has the {aspect} "
            f"{value} and {other.folder} {other_value}; evaluate one of them again."
        )


def _find_differences(
    first: Mapping[str, Any], other: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Name what differs where both say something, with both values."""
    for name in sorted(first.keys() & other.keys()):
        ours, theirs = first[name], other[name]
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            yield from _find_differences(ours, theirs, f"{prefix}{name}.")
        elif ours != theirs:
            yield f"{prefix}{name}", ours, theirs
