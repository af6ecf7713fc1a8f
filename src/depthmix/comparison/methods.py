"""Which runs make one method, and whether methods can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from depthmix.comparison.outcomes import (
    Outcomes,
    find_evaluation,
    list_tasks,
    load_outcomes,
    printable,
)


def read_methods(
    runs: Sequence[str | Path],
    *,
    tasks: Sequence[str] | None = None,
    metric: str | None = None,
) -> dict[str, list[Outcomes]]:
    """Read evaluations, and gather them by the label of their method.

    Args:
        runs: Folders, or `NAME=RUN,RUN,…`.
        tasks: Tasks to read from the runs that have them; `None` reads all.
        metric: Metric of all tasks, as `load_outcomes` takes it.

    Returns:
        The runs of each method, in the order in which they come.

    Raises:
        ValueError: If there are no runs, none has one of the tasks, or those of a method have
            different models, protocols or layers.
        OSError: If a folder holds no evaluation.
    """
    methods: dict[str, list[Outcomes]] = {}
    known: dict[str, None] = {}  # keeps the order
    for run in runs:
        name, folders = _parse_run(run)
        for folder in folders:
            found = find_evaluation(folder)
            available = list_tasks(found)
            known |= dict.fromkeys(available)
            # A method may have one run for each task.
            there = None if tasks is None else [task for task in tasks if task in available]
            outcomes = load_outcomes(found, tasks=there, metric=metric)
            methods.setdefault(name or _label(outcomes), []).append(outcomes)
    if not methods:
        raise ValueError("`runs` must name at least one evaluation, got none.")
    if unknown := [task for task in tasks or () if task not in known]:
        raise ValueError(
            f"`tasks` must be tasks of the runs, and none of them has {', '.join(unknown)}; they "
            f"have {', '.join(known)}."
        )
    for label, outcomes in methods.items():
        for aspect in ("model", "protocol", "layer"):
            values = {Path(str(getattr(run, aspect))).name: run.folder for run in outcomes}
            if len(values) > 1:
                raise ValueError(
                    f"`runs` of one method must differ in nothing but the seed, and those of "
                    f"{label} have the {aspect} {' and '.join(values)}, in "
                    f"{' and '.join(map(str, values.values()))}; name them apart, as `NAME=RUN`."
                )
    return methods


def choose_runs(
    methods: Mapping[str, Sequence[Outcomes]], task: str
) -> dict[str, tuple[Outcomes, ...]]:
    """Choose each method's runs with a task, and check that they can be compared on it.

    Args:
        methods: Runs by method.
        task: A task of at least one of them.

    Returns:
        At least one run for each method.

    Raises:
        ValueError: If a method has no run with the task or two of the same seed, or the runs have
            different items or metrics.
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
        by_seed: dict[int, Outcomes] = {}
        for run in outcomes:
            if (other := by_seed.setdefault(run.seed, run)) is not run:
                raise ValueError(
                    f"`runs` of one method must differ in their seed, and {other.folder} and "
                    f"{run.folder} of {label} both have seed {run.seed} on {task}; leave one out, "
                    "or name them apart, as `NAME=RUN`."
                )
            _check_same_items(first, run, task)
    return chosen


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


def _label(outcomes: Outcomes) -> str:
    """Name a run by its method, and by the layer where it was not read out as a whole."""
    if isinstance(outcomes.layer, int):
        return f"{outcomes.method}, layer {outcomes.layer}"
    return outcomes.method


def _check_same_items(first: Outcomes, other: Outcomes, task: str) -> None:
    """Check that two evaluations judged the same items by the same metric."""
    ours, theirs = first.tasks[task], other.tasks[task]
    if ours.metric != theirs.metric:
        raise ValueError(
            f"`metric` must be one for all runs, and on {task} {first.folder} has {ours.metric} "
            f"and {other.folder} {theirs.metric}; choose one by `metric`."
        )
    lacking, further = ours.scores.keys() - theirs.scores, theirs.scores.keys() - ours.scores
    if lacking or further:
        raise ValueError(
            f"`runs` must have judged the same items, and on {task} {other.folder} lacks "
            f"{len(lacking)} of the {len(ours.scores)} items of {first.folder} and has "
            f"{len(further)} others; evaluate both on the same records."
        )
