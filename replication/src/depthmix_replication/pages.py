"""Findings as files: a page in Markdown, a figure, and all numbers as JSON and CSV."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

from pydantic_core import to_jsonable_python

from depthmix.comparison.scores import Comparison
from depthmix.comparison.tables import to_markdown
from depthmix.figures.maps import to_markdown as grid_table
from depthmix.figures.style import save_figure
from depthmix.files.drafts import write_whole
from depthmix.files.markdown import escape
from depthmix_replication.departures import Departure
from depthmix_replication.drawings import draw, make_grid
from depthmix_replication.experiment_files import load_scale, load_subjects
from depthmix_replication.findings import Contrast, Findings, Row, subject_title
from depthmix_replication.raw_numbers import write_scores, write_training
from depthmix_replication.runs import TOY
from depthmix_replication.trials import Trial
from depthmix_replication.workspace import write_json

MOST_OVERLAPS = 4
"""Methods whose sets of solved items are listed."""

PAGE_NAME = "README.md"
"""The page, under a name that code hosts show at once."""


def write_findings(findings: Sequence[Findings], folder: Path) -> Path:
    """Write an experiment's page with its figures and numbers.

    The same findings give the same files, but for what was timed. Beside the page stand its figure,
    `findings.json` with every interval, `findings.training.csv` with what each run logged, and
    `findings.scores.csv` with each item's score in each run.

    Args:
        findings: Of each model.
        folder: Where the files go; earlier ones of the same experiment are replaced, which
            `check_page` looks at first.

    Returns:
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    experiment = findings[0].experiment
    parts = [f"# {experiment.title}", "", *(f"- {claim}" for claim in experiment.claims)]
    parts += ["", f"    {_command(findings)}", ""]
    for one in findings:
        stem = Path(one.model).name if len(findings) > 1 else "findings"
        save_figure(draw(one), folder / f"{stem}.svg")
        write_json(folder / f"{stem}.json", to_jsonable_python(describe(one)))
        write_training(folder / f"{stem}.training.csv", one.logs)
        write_scores(folder / f"{stem}.scores.csv", one.outcomes)
        parts += [*_section(one, stem), ""]
    return write_whole(folder / PAGE_NAME, "\n".join(parts).rstrip() + "\n")


def check_page(folder: Path, trials: Sequence[Trial]) -> None:
    """Refuse to replace a page by one that shows less.

    Args:
        folder: Where the page is, if there is one.
        trials: What a new page would show.

    Raises:
        FileExistsError: If the page shows a model, a subject or a seed that the new one would not.
    """
    new = {(trial.model, trial.subject, trial.seed) for trial in trials if not trial.run.untuned}
    for path in sorted(folder.glob("*.json")):
        old = json.loads(path.read_text("utf-8"))
        seeds = sorted({seed for row in old["rows"] if row["trainable"] for seed in row["seeds"]})
        shown = itertools.product([old["model"]], old["subjects"], seeds)
        lost = [point for point in shown if point not in new]
        if lost:
            (model, subject, seed), *others = lost
            more = f" and {len(others)} more" if others else ""
            raise FileExistsError(
                f"`results` must not hold a page that shows more than the new one, and that in "
                f"{folder} also has {Path(model).name} on {subject} with seed {seed}{more}; ask "
                "for these as well, choose another folder by `results`, or remove that one."
            )


def describe(findings: Findings) -> dict[str, Any]:
    """Give everything that an experiment found, in JSON's types.

    Args:
        findings: Of one model.

    Returns:
        Experiment, scale, rows with their runs, and the comparison with every interval. Logs and
        items' scores are left to `write_training` and `write_scores`.
    """
    rows = tuple(replace(row, logs={}) for row in findings.rows)
    content: dict[str, Any] = asdict(replace(findings, rows=rows, logs=(), outcomes={}))
    del content["logs"], content["outcomes"]
    if findings.judge is None:
        del content["judge"]
    for row in content["rows"]:
        del row["logs"]
    for method in content["comparison"]["methods"]:
        method["folders"] = [path.parent.parent.name for path in method["folders"]]
    return content


def _command(findings: Sequence[Findings]) -> str:
    """Write the command that makes the page again."""
    first = findings[0]
    seeds = sorted({seed for row in first.rows for seed in row.seeds})
    words = ["depthmix", "reproduce", first.experiment.source, "--scale", first.scale]
    models = tuple(one.model for one in findings)
    if models != (first.experiment.models or load_scale(first.scale).models):
        words += ["--model", *models]
    if first.subjects != first.experiment.subjects:
        words += ["--subjects", ",".join(first.subjects)]
    words += ["--seeds", ",".join(map(str, seeds))]
    if first.judge is not None:
        words += ["--judge.model", first.judge["model"]]
    return shlex.join(words)


def _section(findings: Findings, stem: str) -> Iterator[str]:
    """Say what was found on one model."""
    tuned = [row for row in findings.rows if row.trainable]
    num_runs = len({key for row in tuned for key in row.runs})
    seeds = sorted({seed for row in tuned for seed in row.seeds})
    yield f"## {Path(findings.model).name}, scale {findings.scale}"
    yield ""
    yield (
        f"Tuned on {_list_data(tuned[0])}; {num_runs} training runs, seeds "
        f"{', '.join(map(str, seeds))}, {mean(row.seconds for row in tuned) / 60:.1f} minutes each."
    )
    yield ""
    yield f"![{findings.experiment.title}]({stem}.svg)"
    yield ""
    yield (
        f"All numbers: [intervals and tests]({stem}.json), [each run's log]({stem}.training.csv), "
        f"[each item's score]({stem}.scores.csv)."
    )
    yield ""
    if findings.versions:
        named = (f"{name} {' and '.join(them)}" for name, them in findings.versions.items())
        yield f"Made with {', '.join(named)}."
        yield ""
    if findings.departures:
        yield from _departure_table(findings.departures)
        yield ""
    subjects = (load_subjects()[name] for name in findings.subjects)
    notes = dict.fromkeys(note for subject in subjects for note in subject.departures)
    if notes and findings.scale != TOY:
        yield f"The data depart from the paper's: {'; '.join(notes)}."
        yield ""
    if findings.experiment.shows == "grid":
        for task in findings.comparison.tasks:
            yield grid_table(make_grid(findings, task)).rstrip()
            yield ""
    if findings.experiment.shows == "speed":
        yield from _speed_table(findings)
        yield ""
    yield from _ledger_table(findings.rows)
    yield ""
    yield to_markdown(_without_crowds(findings.comparison))
    if findings.experiment.shows == "overlaps":
        yield ""
        yield from _disagreement_table(findings.comparison)
    if findings.contrasts:
        yield ""
        yield from _contrast_table(findings.contrasts)


def _list_data(row: Row) -> str:
    """List what a method was tuned on, with the size where it changes."""
    parts = []
    for size, subjects in itertools.groupby(
        row.records, key=lambda subject: (row.records[subject], row.steps[subject])
    ):
        names = [subject_title(subject) for subject in subjects]
        each = " each" if len(names) > 1 else ""
        parts.append(f"{', '.join(names)} ({size[0]:,} records, {size[1]:,} steps{each})")
    return ", ".join(parts)


def _without_crowds(comparison: Comparison) -> Comparison:
    """Leave out who solves what where too many methods make a table of hundreds of sets."""
    if len(comparison.methods) <= MOST_OVERLAPS:
        return comparison
    return replace(comparison, tasks=tuple(replace(t, overlaps=()) for t in comparison.tasks))


def _ledger_table(rows: Sequence[Row]) -> Iterator[str]:
    """Lay out how many parameters each row trains."""
    first = next(row for row in rows if row.trainable)
    yield f"| method | trained parameters | beside {escape(first.label)} | minutes per run |"
    yield "|---|---:|---:|---:|"
    for row in rows:
        if row.trainable:
            more = 100 * (row.trainable / first.trainable - 1)
            yield (
                f"| {escape(row.label)} | {row.trainable:,} | {more:+.2f} % | "
                f"{row.seconds / 60:.1f} |"
            )


def _departure_table(departures: Sequence[Departure]) -> Iterator[str]:
    """Lay out which settings are not the paper's."""
    yield "| departs from the paper in | here | paper |"
    yield "|---|---|---|"
    for one in departures:
        here, paper = (", ".join(map(_show, values)) for values in (one.here, one.paper))
        yield f"| {escape(one.setting)} | {here} | {paper} |"


def _show(value: Any) -> str:
    """Write a setting's value in a cell; what is not set, as a dash."""
    if value is None or value == []:
        return "-"
    if isinstance(value, list):
        return ", ".join(map(_show, value))
    return f"{value:g}" if isinstance(value, float) else escape(str(value))


def _disagreement_table(comparison: Comparison) -> Iterator[str]:
    """Lay out how often runs disagree, of two methods and of two seeds of one."""
    yield "| task | run of | and run of | disagree on, % of items | pairs of runs |"
    yield "|---|---|---|---:|---:|"
    for task in comparison.tasks:
        for one in task.disagreements:
            first, second = map(escape, one.methods)
            other = "another seed" if first == second else second
            yield (
                f"| {escape(task.task)} | {first} | {other} | {100 * one.share:.1f} | "
                f"{one.num_pairs} |"
            )
    yield ""
    yield "Runs disagree on an item where one solves it and the other does not."


def _contrast_table(contrasts: Sequence[Contrast]) -> Iterator[str]:
    """Lay out the differences that the experiment asks for."""
    yield "| method | beside | task | difference, points (95 %) | p | p (Holm) |"
    yield "|---|---|---|---:|---:|---:|"
    for one in contrasts:
        estimate, low, high = (
            f"{round(100 * value, 1) + 0.0:+.1f}"  # no minus before a zero
            for value in (
                one.difference.estimate,
                one.difference.interval.low,
                one.difference.interval.high,
            )
        )
        yield (
            f"| {escape(one.method)} | {escape(one.other)} | {escape(one.task)} | {estimate} "
            f"({low} to {high}) | {one.difference.p_value:.3f} | {one.adjusted_p_value:.3f} |"
        )


def _speed_table(findings: Findings) -> Iterator[str]:
    """Lay out the speed of generation of each row: mean and range over seeds."""
    yield "| method | layers per token | tokens/s | over dense |"
    yield "|---|---:|---:|---:|"
    for row in findings.rows:
        if not row.speeds:
            continue
        cells = []
        for name in ("layers_per_token", "tokens_per_second", "speedup"):
            values = [getattr(speed, name) for speed in row.speeds]
            cells.append(f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        yield f"| {' | '.join([escape(row.label), *cells])} |"
    yield ""
    yield "In brackets the least and the greatest of the seeds."
