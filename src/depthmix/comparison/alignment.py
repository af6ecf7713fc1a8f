"""Scores of all methods on the same items, in one order, and what resampling makes of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from depthmix.evaluation.result import EvaluationResult
from depthmix.evaluation.samples import Reference
from depthmix.statistics.intervals import is_binary
from depthmix.statistics.resampling import average_seeds, resample_items, resample_seeds

ACCURACIES = ("acc", "acc_norm", "acc_bytes", "exact_match")
"""Metrics that say whether the right answer was given."""


@dataclass(frozen=True, kw_only=True)
class AlignedTask:
    """One task's scores, of the items that are rated in all runs."""

    task: str
    """The task's name."""

    metric: str
    """lm-eval's name of the metric and its filter."""

    documents: tuple[tuple[object, ...], ...]
    """Name of each item, sorted; tasks with the same documents have the same names."""

    num_left_out: int
    """Items without a rating in at least one run."""

    scores: Mapping[str, Float[np.ndarray, "_ items"]]
    """By method, from 0 to 1 or losses, for every seed and item."""

    blind_score: float | None
    """What can be scored without reading the items, as in `TaskComparison`."""

    runs: Mapping[str, tuple[str, ...]]
    """By method, what its training runs are known by: their tuned weights, or their folders."""

    is_loss: bool = False
    """Whether the scores are losses, of which less is better."""


@dataclass(frozen=True, kw_only=True)
class Resamples:
    """One method's scores on one task, and their resampled means."""

    runs: tuple[str, ...]
    """What its training runs are known by."""

    scores: Float[np.ndarray, "seeds items"]
    """From 0 to 1, or losses."""

    resampled: Float[np.ndarray, " resamples"]
    """Means over resampled items and seeds."""


def align(task: str, chosen: Mapping[str, Sequence[EvaluationResult]]) -> AlignedTask:
    """Put the scores of all runs on the items that all have rated into one order.

    Args:
        task: The task.
        chosen: Runs by method, which have the same items.

    Returns:
        The scores, and how many items were left out.

    Raises:
        ValueError: If no item is rated in all runs.
    """
    outcomes = [run.tasks[task] for runs in chosen.values() for run in runs]
    unrated = frozenset().union(*(run.unrated for run in outcomes))
    items = [item for item in outcomes[0].scores if item not in unrated]
    if not items:
        raise ValueError(
            f"`runs` must share at least one item with a rating, and on {task} each of the "
            f"{len(unrated)} items lacks one in some run; evaluate again, or choose others by "
            "`tasks`."
        )
    names = {item: item[1:] for item in items}
    if len(set(names.values())) < len(items):  # a document that two tasks of a group share
        names = {item: item for item in items}
    items.sort(key=names.__getitem__)
    scores = {
        label: np.array([[run.tasks[task].scores[item] for item in items] for run in runs])
        for label, runs in chosen.items()
    }
    metric, references = outcomes[0].metric, outcomes[0].references
    says_right = metric.partition(",")[0] in ACCURACIES and all(map(is_binary, scores.values()))
    return AlignedTask(
        task=task,
        metric=metric,
        documents=tuple(names[item] for item in items),
        num_left_out=len(unrated),
        scores=scores,
        blind_score=score_blindly([references.get(item) for item in items]) if says_right else None,
        is_loss=outcomes[0].is_loss,
        runs={
            label: tuple(run.adapter or str(run.folder) for run in runs)
            for label, runs in chosen.items()
        },
    )


def score_blindly(references: Sequence[Reference | None]) -> float | None:
    """Score without reading the items: by guessing, or by the commonest answer to all of them.

    Args:
        references: The right answer to each item.

    Returns:
        The better of both, from 0 to 1; `None` if an answer is not known.
    """
    known = [reference for reference in references if reference is not None]
    if len(known) < len(references):
        return None
    guessed = sum(1 / reference.num_choices for reference in known if reference.num_choices)
    ((_, commonest),) = Counter(reference.text for reference in known).most_common(1)
    return max(guessed, commonest) / len(known)


def resample(
    tasks: Mapping[str, AlignedTask], rng: np.random.Generator
) -> dict[str, dict[str, Resamples]]:
    """Resample every task's items for all methods at once, and every method's seeds.

    Tasks that ask the same items share their draw, since a hard question is hard on all of them.
    Where the same training runs answer several tasks, or are read out as several methods, they
    share their draw of seeds, since a lucky seed is lucky everywhere.

    Args:
        tasks: The tasks by name.
        rng: Source of the draws.

    Returns:
        The resamples by task and method.
    """
    together: dict[tuple[tuple[object, ...], ...], list[AlignedTask]] = {}
    for task in tasks.values():
        together.setdefault(task.documents, []).append(task)
    weights: dict[tuple[str, ...], np.ndarray] = {}
    found: dict[str, dict[str, Resamples]] = {name: {} for name in tasks}
    for group in together.values():
        rows = [(task, label) for task in group for label in task.scores]
        tables = [task.scores[label] for task, label in rows]
        means = resample_items(np.concatenate(tables), rng)
        ends = np.cumsum([len(table) for table in tables])[:-1]
        for (task, label), own in zip(rows, np.split(means, ends, axis=1), strict=True):
            runs = task.runs[label]
            if runs not in weights:
                weights[runs] = resample_seeds(len(runs), rng)
            found[task.task][label] = Resamples(
                runs=runs,
                scores=task.scores[label],
                resampled=average_seeds(own, weights[runs]),
            )
    return found
