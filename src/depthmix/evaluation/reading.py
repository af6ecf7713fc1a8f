"""Evaluations as they are read: from their folders, and from runs of earlier versions.

The samples become one score per item, under a name of the item that is the same in every evaluation
of the same records, whatever their order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from depthmix.evaluation.earlier import find_earlier
from depthmix.evaluation.folder import RESULTS_NAME
from depthmix.evaluation.result import EvaluationResult, TaskResult
from depthmix.evaluation.samples import (
    Item,
    Reference,
    choose_metric,
    name_items,
    read_samples,
    score_items,
)

FACTS = ("method", "model", "protocol", "layer", "seed", "main_metric")


def load_evaluation(
    folder: str | Path, *, tasks: Sequence[str] | None = None, metric: str | None = None
) -> EvaluationResult:
    """Read the score of every item of an evaluation.

    Args:
        folder: Folder with `results.json` and a file of samples per task; or of a run that an
            earlier version measured in training.
        tasks: Tasks or groups to read; `None` reads all, a group in place of its tasks.
        metric: Metric to read in every task, with its filter (`acc,none`) or without (`acc`, where
            one filter has it); `None` takes each task's main metric.

    Returns:
        The outcomes, by task and item.

    Raises:
        ValueError: If a file is damaged, a task or metric is not in the evaluation, or a score is
            not a number from 0 to 1.
        OSError: If a file is missing.
    """
    folder = Path(folder).expanduser()
    results = _read_results(folder)
    if earlier := find_earlier(folder, results):
        return _choose_earlier(folder, earlier["after"], tasks, metric)
    available = _find_tasks(folder, results)
    facts = results["depthmix"]
    leaves = facts["main_metric"]
    if tasks is None:
        inside = {leaf for name, inner in available.items() if name not in leaves for leaf in inner}
        tasks = [name for name in available if name not in inside]
    if missing := [name for name in tasks if name not in available]:
        raise ValueError(
            f"`tasks` must be tasks of the evaluation, and {folder} has no "
            f"{', '.join(missing)}; it has {', '.join(available)}."
        )
    return EvaluationResult(
        folder=folder,
        method=printable(str(facts["method"])),
        model=str(facts["model"]),
        protocol=str(facts["protocol"]),
        layer=facts["layer"],
        seed=int(facts["seed"]),
        settings=facts.get("settings"),
        adapter=facts.get("adapter_sha256"),
        dtype=facts.get("dtype"),
        top_k=facts.get("top_k"),
        tasks={
            name: TaskResult(
                **_load_scores(
                    folder,
                    {leaf: leaves[leaf] for leaf in available[name]},
                    metric,
                    highest=facts.get("highest_score", {}).get(name, 1.0),
                ),
                num_fewshot=_find_num_fewshot(results, available[name]),
                measures=_find_measures(results, name),
                data=_find_data(results, name),
            )
            for name in tasks
        },
    )


def list_tasks(folder: str | Path) -> tuple[str, ...]:
    """List the tasks of an evaluation, and the groups of tasks that share a metric.

    Args:
        folder: Folder with `results.json`.

    Returns:
        The names that `load_evaluation` knows, groups first.

    Raises:
        ValueError: If the file is damaged.
        OSError: If it is missing.
    """
    folder = Path(folder).expanduser()
    results = _read_results(folder)
    if earlier := find_earlier(folder, results):
        return tuple(earlier["after"].tasks)
    return tuple(_find_tasks(folder, results))


def _choose_earlier(
    folder: Path, found: EvaluationResult, tasks: Sequence[str] | None, metric: str | None
) -> EvaluationResult:
    """Check that what is asked of a run of an earlier version is what was measured."""
    known = found.task.metric
    if missing := [name for name in tasks or () if name not in found.tasks]:
        raise ValueError(
            f"`tasks` must be tasks of the evaluation, and {folder} has no "
            f"{', '.join(missing)}; it has {', '.join(found.tasks)}."
        )
    if metric not in (None, known):
        raise ValueError(
            f"`metric` must be {known} for {folder}, which an earlier version measured in "
            f"training, got {metric}; evaluate it again."
        )
    return found


def printable(text: str) -> str:
    """Write a text on one line without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _read_results(folder: Path) -> Any:
    """Read what the folder of an evaluation, or of a run, holds as its results."""
    path = folder / RESULTS_NAME
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"Cannot read {path}: {error}.") from error


def _find_tasks(folder: Path, results: Any) -> dict[str, tuple[str, ...]]:
    """Find the tasks of each name in results, which must be those of `depthmix evaluate`."""
    path = folder / RESULTS_NAME
    facts = results.get("depthmix") if isinstance(results, dict) else None
    if not isinstance(facts, dict):
        facts = {}
    if missing := [name for name in FACTS if name not in facts]:
        raise ValueError(
            f"`runs` must be written by `depthmix evaluate`, and {path} does not say the "
            f"{', '.join(missing)}; evaluate the model again."
        )
    leaves = facts["main_metric"]
    groups = _poolable_groups(results.get("group_subtasks") or {}, leaves)
    return groups | {leaf: (leaf,) for leaf in leaves}


def _poolable_groups(
    subtasks: Mapping[str, Sequence[str]], leaves: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """Find the outermost groups whose tasks all share one main metric."""

    def members(name: str) -> tuple[str, ...]:
        inner = subtasks.get(name)
        return tuple(leaf for child in inner for leaf in members(child)) if inner else (name,)

    groups = {name: members(name) for name in subtasks if name not in leaves and subtasks[name]}
    groups = {
        name: inner
        for name, inner in groups.items()
        if all(leaf in leaves for leaf in inner) and len({leaves[leaf] for leaf in inner}) == 1
    }
    inside = {child for name in groups for child in subtasks[name]}
    return {name: inner for name, inner in groups.items() if name not in inside}


def _find_num_fewshot(results: Mapping[str, Any], leaves: Sequence[str]) -> tuple[int, ...]:
    """Find how many examples the prompts had: lm-eval's number, else the one asked for."""
    asked = results["depthmix"].get("num_fewshot")
    numbers = {results.get("n-shot", {}).get(leaf, asked) for leaf in leaves}
    return tuple(sorted(number for number in numbers if number is not None))


def _find_measures(results: Mapping[str, Any], task: str) -> dict[str, float]:
    """Take lm-eval's means of a task's metrics, of the filter of its main one."""
    main = results["depthmix"]["main_metric"].get(task, "").rpartition(",")[2]
    values = results.get("results", {}).get(task, {})
    return {
        key.rpartition(",")[0]: value
        for key, value in values.items()
        if key.endswith(f",{main}") and "_stderr" not in key and isinstance(value, int | float)
    }


def _find_data(results: Mapping[str, Any], task: str) -> Mapping[str, Any]:
    """Find what is said of a task's data, or of the named set that it is a part of."""
    data, groups = results["depthmix"].get("data", {}), results.get("group_subtasks") or {}
    names = [
        name
        for name in data
        if name == task or task in groups.get(name, ()) or task.startswith(f"{name}_")
    ]
    return data[max(names, key=len)] if names else {}


def _load_scores(
    folder: Path, leaves: Mapping[str, str], metric: str | None, *, highest: float
) -> dict[str, Any]:
    """Read metric, scores, references and unrated items of a task, or of all tasks of a group.

    Scores are shares of the highest one.
    """
    scores: dict[Item, float | None] = {}
    references: dict[Item, Reference | None] = {}
    metrics = set()
    for leaf, main_metric in leaves.items():
        samples = read_samples(folder / f"samples_{leaf}.jsonl")
        chosen = choose_metric(metric or main_metric, samples, f"{leaf} of {folder}")
        metrics.add(chosen)
        items = name_items(leaf, chosen.rpartition(",")[2], samples, folder)
        scores |= score_items(items, chosen, folder, highest=highest)
        references |= {item: sample["reference"] for item, sample in items.items()}
    if len(metrics) > 1:
        raise ValueError(
            f"`metric` must name one metric and filter for all of {', '.join(leaves)}, got "
            f"{metric}, which is {' and '.join(sorted(metrics))}."
        )
    of_highest = "" if highest == 1 else f" / {highest:g}"
    return {
        "metric": metrics.pop() + of_highest,
        "scores": {item: score for item, score in scores.items() if score is not None},
        "references": references,
        "unrated": frozenset(item for item, score in scores.items() if score is None),
    }
