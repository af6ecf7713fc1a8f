"""What an evaluation on disk says about every item.

`depthmix evaluate` writes lm-eval's `results.json` and one file of samples per task. Here the
samples become one score per item, under a name of the item that is the same in every evaluation of
the same records, whatever their order.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

RESULTS_NAME = "results.json"
FACTS = ("method", "model", "protocol", "layer", "seed", "main_metric")

Item = tuple[str, str, int]
"""Task, hash of the document, and which of several equal documents it is, by `doc_id`."""


@dataclass(frozen=True, kw_only=True)
class TaskOutcomes:
    """The scores of one task's items."""

    metric: str
    """lm-eval's name of the metric and its filter, such as `acc_norm,none`."""

    scores: Mapping[Item, float]
    """A number from 0 to 1 for each item; 1 is right."""


@dataclass(frozen=True, kw_only=True)
class Outcomes:
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

    tasks: Mapping[str, TaskOutcomes]
    """The outcomes by task; a group whose tasks share a metric is one task."""


def find_evaluation(run: str | Path) -> Path:
    """Find the evaluation that a path stands for.

    Args:
        run: Folder of an evaluation, or of a run with exactly one evaluation in `evaluation/`.

    Returns:
        The evaluation's folder.

    Raises:
        ValueError: If the run has several evaluations.
        OSError: If there is none.
    """
    folder = Path(run).expanduser()
    inner = folder / "evaluation"
    if not inner.is_dir():
        if (folder / RESULTS_NAME).is_file():
            return folder
        raise FileNotFoundError(
            f"`runs` must be folders of evaluations or of evaluated runs, and {folder} holds "
            f"neither {RESULTS_NAME} nor evaluation/; run `depthmix evaluate {folder}`."
        )
    found = sorted(path.parent for path in inner.glob(f"*/{RESULTS_NAME}"))
    if not found:
        raise FileNotFoundError(
            f"`runs` must be evaluated, and {inner} holds no finished evaluation; run "
            f"`depthmix evaluate {folder}`."
        )
    if len(found) > 1:
        raise ValueError(
            f"`runs` must each stand for one evaluation, and {folder} has {len(found)}; name one "
            f"of {', '.join(map(str, found))}."
        )
    return found[0]


def load_outcomes(
    folder: str | Path, *, tasks: Sequence[str] | None = None, metric: str | None = None
) -> Outcomes:
    """Read the score of every item of an evaluation.

    Args:
        folder: Folder with `results.json` and a file of samples per task.
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
    facts, available = _read_results(folder)
    leaves = facts["main_metric"]
    if tasks is None:
        inside = {leaf for name, inner in available.items() if name not in leaves for leaf in inner}
        tasks = [name for name in available if name not in inside]
    if missing := [name for name in tasks if name not in available]:
        raise ValueError(
            f"`tasks` must be tasks of the evaluation, and {folder} has no "
            f"{', '.join(missing)}; it has {', '.join(available)}."
        )
    return Outcomes(
        folder=folder,
        method=printable(str(facts["method"])),
        model=str(facts["model"]),
        protocol=str(facts["protocol"]),
        layer=facts["layer"],
        seed=int(facts["seed"]),
        tasks={
            name: _load_task(
                folder,
                {leaf: leaves[leaf] for leaf in available[name]},
                metric,
                highest=facts.get("highest_score", {}).get(name, 1.0),
            )
            for name in tasks
        },
    )


def list_tasks(folder: str | Path) -> tuple[str, ...]:
    """List the tasks of an evaluation, and the groups of tasks that share a metric.

    Args:
        folder: Folder with `results.json`.

    Returns:
        The names that `load_outcomes` knows, groups first.

    Raises:
        ValueError: If the file is damaged.
        OSError: If it is missing.
    """
    return tuple(_read_results(Path(folder).expanduser())[1])


def printable(text: str) -> str:
    """Write a text on one line without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _read_results(folder: Path) -> tuple[Mapping[str, Any], dict[str, tuple[str, ...]]]:
    """Read what `depthmix evaluate` says of an evaluation, and the tasks of each of its names."""
    path = folder / RESULTS_NAME
    try:
        results = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"Cannot read {path}: {error}.") from error
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
    return facts, groups | {leaf: (leaf,) for leaf in leaves}


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


def _load_task(
    folder: Path, leaves: Mapping[str, str], metric: str | None, *, highest: float
) -> TaskOutcomes:
    """Read the scores of a task, or of all tasks of a group, as shares of the highest one."""
    scores: dict[Item, float] = {}
    metrics = set()
    for leaf, main_metric in leaves.items():
        samples = _read_samples(folder / f"samples_{leaf}.jsonl")
        chosen = _choose_metric(metric or main_metric, samples, f"{leaf} of {folder}")
        metrics.add(chosen)
        scores |= _score_items(leaf, chosen, samples, folder, highest=highest)
    if len(metrics) > 1:
        raise ValueError(
            f"`metric` must name one metric and filter for all of {', '.join(leaves)}, got "
            f"{metric}, which is {' and '.join(sorted(metrics))}."
        )
    of_highest = "" if highest == 1 else f" / {highest:g}"
    return TaskOutcomes(metric=metrics.pop() + of_highest, scores=scores)


def _choose_metric(metric: str, samples: Sequence[Mapping[str, Any]], where: str) -> str:
    """Complete a metric by its filter, and check that the samples have it."""
    keys = {
        f"{name},{sample['filter']}": None for sample in samples for name in sample["metrics"]
    }  # a dict keeps their order
    found = [key for key in keys if metric in (key, key.rpartition(",")[0])]
    if len(found) != 1:
        raise ValueError(
            f"`metric` must name one metric of every task, and {metric} names "
            f"{len(found) or 'none'} in {where}; it has {' '.join(keys)}."
        )
    return found[0]


def _score_items(
    task: str,
    metric: str,
    samples: Iterable[Mapping[str, Any]],
    folder: Path,
    *,
    highest: float,
) -> dict[Item, float]:
    """Name every item by its document, and read its score."""
    name, _, filter_name = metric.rpartition(",")
    chosen = [sample for sample in samples if sample["filter"] == filter_name]
    chosen.sort(key=lambda sample: sample["doc_id"])
    for earlier, later in pairwise(chosen):
        if earlier["doc_id"] == later["doc_id"]:
            raise ValueError(
                f"Each item must be judged once, and {task} in {folder} has item "
                f"{later['doc_id']} twice; evaluate it again."
            )
    seen: Counter[str] = Counter()
    scores = {}
    for sample in chosen:
        score = sample.get(name)
        if not isinstance(score, int | float) or not 0 <= score <= highest:
            raise ValueError(
                f"`metric` must give every item a number from 0 to {highest:g}, and {metric} is "
                f"{score!r:.40} for item {sample['doc_id']} of {task} in {folder}; choose another "
                "by `metric`."
            )
        scores[task, sample["doc_hash"], seen[sample["doc_hash"]]] = score / highest
        seen[sample["doc_hash"]] += 1
    return scores


def _read_samples(path: Path) -> list[dict[str, Any]]:
    """Read lm-eval's samples, without the long texts that scores do not need."""
    if not path.is_file():
        raise FileNotFoundError(
            f"Cannot find {path}, which `depthmix evaluate` writes; the evaluation did not finish."
        )
    unused = ("doc", "arguments", "resps", "filtered_resps")
    samples = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                sample = json.loads(line)
                missing = {"doc_id", "doc_hash", "filter", "metrics"} - set(sample)
            except (ValueError, TypeError) as error:
                raise ValueError(f"Cannot read line {number} of {path}: {error}.") from error
            if missing:
                raise ValueError(
                    f"Line {number} of {path} must be one of lm-eval's samples, and lacks "
                    f"{', '.join(sorted(missing))}; evaluate again."
                )
            samples.append({key: value for key, value in sample.items() if key not in unused})
    if not samples:
        raise ValueError(f"{path} must hold at least one item, and is empty; evaluate again.")
    return samples
