"""The numbers behind a page, as CSV: each step that a run logged, and each item's score."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from depthmix.evaluation.result import EvaluationResult
from depthmix.evaluation.samples import Item
from depthmix.files.drafts import drafting
from depthmix_replication.findings import RunLog

LEFT_OUT = ("epoch", "tokens_per_second", "memory_gib")
"""What a log holds that is no result of a training, or that its steps say."""

ITEM_DIGITS = 12
"""Of the hash that names an item."""


def write_training(path: Path, logs: Sequence[RunLog]) -> None:
    """Write what each run logged of its steps, one line for each, to six digits.

    Args:
        path: File that is replaced.
        logs: Of all runs. A quantity that a run does not log is left empty; what the trainer logs
            besides losses, such as its summary, is left out.
    """
    logged: list[tuple[dict[str, Any], Mapping[str, Any]]] = []
    for log in logs:
        place = {"run": log.run, "method": "; ".join(log.methods)}
        place |= {"subject": "; ".join(log.subjects), "seed": str(log.seed)}
        logged += [(place, entry) for entry in log.entries if "loss" in entry]
    names = dict.fromkeys(name for _, entry in logged for name in entry if name not in LEFT_OUT)
    columns = ["run", "method", "subject", "seed", *dict.fromkeys(["step", *names])]
    _write(path, columns, ({**place, **entry} for place, entry in logged))


def write_scores(path: Path, outcomes: Mapping[str, Sequence[EvaluationResult]]) -> None:
    """Write each item's score from 0 to 1, a line for each item and a column for each run.

    Items go by the beginning of lm-eval's hash of the document. Where no judge rated an item, and
    where a run did not answer it, there is nothing.

    Args:
        path: File that is replaced.
        outcomes: Evaluations by the label of their method.
    """
    lines: dict[Item, dict[str, Any]] = {}
    columns: dict[str, None] = {}
    for label, runs in outcomes.items():
        for run in runs:
            # Runs of several data sets that share their seed share a column.
            column = label if run.adapter is None else f"{label}, seed {run.seed}"
            columns[column] = None
            for task in run.tasks.values():
                for item in (*task.scores, *task.unrated):
                    lines.setdefault(item, _name(item))[column] = task.scores.get(item, "")
    _write(path, ["task", "item", *columns], (lines[item] for item in sorted(lines)))


def _name(item: Item) -> dict[str, Any]:
    """Name an item; one of several equal documents has a number."""
    task, document, place = item
    return {"task": task, "item": document[:ITEM_DIGITS] + (f"-{place}" if place else "")}


def _write(path: Path, columns: Sequence[str], lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a table, floats to six digits."""
    with drafting(path) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(list(_cells(line, columns)) for line in lines)


def _cells(line: Mapping[str, Any], columns: Sequence[str]) -> Iterator[str]:
    for column in columns:
        value = line.get(column, "")
        yield f"{value:.6g}" if isinstance(value, float) else str(value)
