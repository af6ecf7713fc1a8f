"""Methods compared on the same items: means, differences, and which items each method solves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from depthmix.comparison.alignment import AlignedTask, Resamples, align, resample
from depthmix.comparison.methods import choose_runs, read_methods
from depthmix.comparison.recovery import Gap, recover_gap
from depthmix.comparison.scores import (
    AVERAGE,
    Comparison,
    Method,
    MethodScore,
    TaskComparison,
)
from depthmix.evaluation.result import EvaluationResult
from depthmix.statistics.intervals import (
    PairedDifference,
    bootstrap_interval,
    bootstrap_p_value,
    holm,
    is_binary,
    summarise_difference,
    summarise_mean,
)
from depthmix.statistics.overlaps import count_overlaps, measure_disagreements


def compare(
    runs: Sequence[str | Path],
    *,
    tasks: Sequence[str] | None = None,
    metric: str | None = None,
    gaps: Sequence[Gap] = (),
    seed: int = 0,
) -> Comparison:
    """Compare evaluated runs on the same items.

    Args:
        runs: Evaluations, or runs with one evaluation, each as its folder or as `NAME=RUN,RUN,…`.
            Runs of the same name, or with the same label of their method, are one method with
            several seeds. The first method is the baseline.
        tasks: Tasks to compare; `None` takes all tasks of the runs.
        metric: Metric of all tasks, such as `acc` or `acc_norm,none`; by default each task's own.
        gaps: Gaps between two methods, of which a third one's share is asked for.
        seed: Of the bootstraps' resamples.

    Returns:
        Means, intervals, differences from the baseline, and the overlap of solved items.

    Raises:
        ValueError: If two runs have different items, metrics, numbers of examples, data or judges,
            a method lacks a task, the runs of a method agree in their seed or differ in anything
            else, or a gap names a method that is not there, or is asked for on a loss.
        OSError: If a folder holds no evaluation.
    """
    methods = read_methods(runs, tasks=tasks, metric=metric)
    return compare_outcomes(methods, tasks=tasks, gaps=gaps, seed=seed)


def compare_outcomes(
    methods: Mapping[str, Sequence[EvaluationResult]],
    *,
    tasks: Sequence[str] | None = None,
    gaps: Sequence[Gap] = (),
    seed: int = 0,
) -> Comparison:
    """Compare evaluations that have been read.

    Args:
        methods: Evaluations by the label of their method, one for each training seed; the first
            method is the baseline.
        tasks: As for `compare`.
        gaps: As for `compare`.
        seed: As for `compare`.

    Returns:
        As `compare` does.

    Raises:
        ValueError: As `compare` does.
    """
    named = [label for gap in gaps for label in (gap.start, gap.goal, gap.method)]
    if unknown := [label for label in named if label not in methods]:
        raise ValueError(
            f"`gaps` must name methods of the runs, and {unknown[0]} is none; they are "
            f"{', '.join(methods)}."
        )
    names = list(dict.fromkeys(tasks or _all_tasks(methods)))
    rng = np.random.default_rng(seed)
    tables = {task: align(task, choose_runs(methods, task)) for task in names}
    samples = resample(tables, rng)
    rows = [_compare_task(tables[task], samples[task]) for task in names]
    resampled = [{m: own.resampled for m, own in samples[task].items()} for task in names]
    fewest = [row.num_items for row in rows]
    shares = [number for number, row in enumerate(rows) if not row.is_loss]
    if gaps and len(shares) < len(names):
        losses = [row.task for row in rows if row.is_loss]
        raise ValueError(
            f"`gaps` must be between scores from 0 to 1, and {losses[0]} is a loss; choose other "
            "`tasks`."
        )
    if len(shares) > 1:
        averaged = [tables[names[number]] for number in shares]
        num_items = len(set().union(*(table.documents for table in averaged)))
        fewest.append(min(fewest[number] for number in shares))
        resampled.append(
            {m: np.mean([resampled[number][m] for number in shares], axis=0) for m in methods}
        )
        rows.append(
            _compare_average(
                [rows[number] for number in shares],
                [samples[names[number]] for number in shares],
                resampled[-1],
                num_items=num_items,
            )
        )
    p_values = [s.difference.p_value for row in rows for s in row.scores if s.difference]
    adjusted = iter(holm(p_values))
    rows = [
        replace(row, scores=tuple(_adjust(score, adjusted) for score in row.scores)) for row in rows
    ]
    return Comparison(
        methods=tuple(
            Method(
                label=label,
                folders=tuple(run.folder for run in outcomes),
                seeds=tuple(run.seed for run in outcomes),
                model=outcomes[0].model,
                protocol=outcomes[0].protocol,
                dtype=next((run.dtype for run in outcomes if run.dtype), None),
            )
            for label, outcomes in methods.items()
        ),
        tasks=tuple(rows[: len(names)]),
        average=rows[-1] if len(shares) > 1 else None,
        num_tests=len(p_values),
        recoveries=tuple(
            recover_gap(
                gap,
                task=row.task,
                means={score.method: score.mean for score in row.scores},
                resampled=own,
                num_items=number,
            )
            for gap in gaps
            for row, own, number in zip(rows, resampled, fewest, strict=True)
        ),
    )


def _all_tasks(methods: Mapping[str, Sequence[EvaluationResult]]) -> list[str]:
    """List the tasks of all methods, each once, in the order in which they come."""
    return [task for outcomes in methods.values() for run in outcomes for task in run.tasks]


def _adjust(score: MethodScore, adjusted: Iterator[float]) -> MethodScore:
    """Give a score with a difference the next adjusted p-value."""
    return score if score.difference is None else replace(score, adjusted_p_value=next(adjusted))


def _compare_task(table: AlignedTask, samples: Mapping[str, Resamples]) -> TaskComparison:
    """Compare all methods with the first one on one task."""
    baseline = next(iter(samples.values()))
    scores = tuple(
        MethodScore(
            method=label,
            mean=float(sample.scores.mean()),
            interval=summarise_mean(sample.scores, sample.resampled, are_losses=table.is_loss),
            num_seeds=len(sample.scores),
            seed_means=tuple(sample.scores.mean(axis=1).tolist()),
            difference=None
            if sample is baseline
            else summarise_difference(
                baseline.scores,
                sample.scores,
                sample.resampled - baseline.resampled,
                are_losses=table.is_loss,
            ),
        )
        for label, sample in samples.items()
    )
    says_right = not table.is_loss and all(map(is_binary, table.scores.values()))
    solved = table.scores if says_right else None
    return TaskComparison(
        task=table.task,
        metric=table.metric,
        num_items=len(table.documents),
        num_left_out=table.num_left_out,
        scores=scores,
        blind_score=table.blind_score,
        overlaps=() if solved is None else count_overlaps(solved),
        disagreements=() if solved is None else measure_disagreements(solved),
    )


def _compare_average(
    rows: Sequence[TaskComparison],
    samples: Sequence[Mapping[str, Resamples]],
    resampled: Mapping[str, np.ndarray],
    *,
    num_items: int,
) -> TaskComparison:
    """Compare all methods with the first one on the unweighted mean over tasks.

    `resampled` holds each method's resamples, averaged over tasks. `num_items` counts an item that
    several tasks share once, since it is no further evidence.
    """
    scores: list[MethodScore] = []
    baseline = next(iter(samples[0]))
    fewest = min(row.num_items for row in rows)
    for number, label in enumerate(samples[0]):
        parts = [row.scores[number] for row in rows]
        mean = float(np.mean([part.mean for part in parts]))
        difference = None
        if label != baseline:
            changes = resampled[label] - resampled[baseline]
            estimate = float(np.mean([p.difference.estimate for p in parts if p.difference]))
            difference = PairedDifference(
                estimate=estimate,
                interval=bootstrap_interval(changes, estimate, num_items=fewest, lowest=-1),
                p_value=bootstrap_p_value(changes, num_items=num_items),
                test="bootstrap",
            )
        together = len({task[label].runs for task in samples}) == 1
        scores.append(
            MethodScore(
                method=label,
                mean=mean,
                interval=bootstrap_interval(resampled[label], mean, num_items=fewest, lowest=0),
                num_seeds=min(part.num_seeds for part in parts),
                seed_means=tuple(np.mean([p.seed_means for p in parts], axis=0).tolist())
                if together
                else (),
                difference=difference,
            )
        )
    metrics = ", ".join(dict.fromkeys(row.metric for row in rows))
    return TaskComparison(
        task=AVERAGE,
        metric=metrics,
        num_items=sum(row.num_items for row in rows),
        num_left_out=sum(row.num_left_out for row in rows),
        scores=tuple(scores),
    )
