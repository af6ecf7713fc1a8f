"""Finished runs of an experiment read, and put together into findings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from depthmix.comparison.comparison import compare_outcomes
from depthmix.comparison.methods import read_methods
from depthmix.comparison.recovery import Gap
from depthmix.evaluation.folder import RESULTS_NAME as EVALUATION_NAME
from depthmix.evaluation.generation_speed import GenerationSpeed
from depthmix.evaluation.result import EvaluationResult
from depthmix.files.runs import RESULTS_NAME
from depthmix.statistics.intervals import holm
from depthmix_replication.departures import list_departures
from depthmix_replication.experiment import Experiment, Scale
from depthmix_replication.findings import Contrast, Findings, Row, RunLog
from depthmix_replication.sizes import count_layers
from depthmix_replication.trials import Trial
from depthmix_replication.workspace import Workspace, read_seconds


def gather(
    experiment: Experiment, scale: Scale, trials: Sequence[Trial], workspace: Workspace
) -> tuple[Findings, ...]:
    """Collect what finished runs say.

    Args:
        experiment: The experiment.
        scale: Its scale.
        trials: All of its trials; their runs must be finished.
        workspace: Where the runs are.

    Returns:
        Findings for each model.
    """
    found = []
    for model in dict.fromkeys(trial.model for trial in trials):
        own = [trial for trial in trials if trial.model == model]
        labels = list(dict.fromkeys(trial.label for trial in own))
        by_label = {label: [t for t in own if t.label == label] for label in labels}
        named = {label: _name_folders(label, t, workspace) for label, t in by_label.items()}
        firsts = [rows[0] for rows in by_label.values()]
        outcomes = read_methods(list(named.values()))
        found.append(
            Findings(
                experiment=experiment,
                scale=scale,
                model=model,
                subjects=tuple(dict.fromkeys(trial.subject for trial in own)),
                rows=tuple(make_row(rows, workspace) for rows in by_label.values()),
                comparison=compare_outcomes(outcomes, gaps=_list_gaps(experiment, firsts)),
                contrasts=_contrast(experiment, firsts, outcomes),
                departures=list_departures(experiment, own, count_layers=count_layers),
                judge=next((trial.reading.judge for trial in own if trial.reading.judge), None),
                versions=_list_versions(own, workspace),
                logs=tuple(list_logs(own, workspace)),
                outcomes=outcomes,
            )
        )
    return tuple(found)


def _list_gaps(experiment: Experiment, trials: Sequence[Trial]) -> list[Gap]:
    """List the gaps of which a method may recover a share; `trials` are one of each label."""
    recovers = {method.name: method.recovers for method in experiment.methods}
    return [
        Gap(
            start=replace(trial, method=ends[0]).label,
            goal=replace(trial, method=ends[1]).label,
            method=trial.label,
        )
        for trial in trials
        if (ends := recovers[trial.method]) is not None
    ]


def _contrast(
    experiment: Experiment,
    trials: Sequence[Trial],
    outcomes: Mapping[str, Sequence[EvaluationResult]],
) -> tuple[Contrast, ...]:
    """Compare methods with those that they are to stand beside, task by task and on average.

    `trials` are one of each label.
    """
    beside = {method.name: method.beside for method in experiment.methods}
    pairs = [
        (trial.label, replace(trial, method=other).label)
        for trial in trials
        for other in beside[trial.method]
    ]
    found = []
    for label, other in pairs:
        for row in compare_outcomes({name: outcomes[name] for name in (other, label)}).rows:
            difference = row.scores[1].difference
            assert difference is not None  # the second method has one
            found.append((label, other, row.task, difference))
    adjusted = holm([difference.p_value for *_, difference in found])
    return tuple(
        Contrast(method=label, other=other, task=task, difference=difference, adjusted_p_value=p)
        for (label, other, task, difference), p in zip(found, adjusted, strict=True)
    )


def _name_folders(label: str, trials: Sequence[Trial], workspace: Workspace) -> str:
    """Name a method's evaluations as `compare` takes them; shared ones count once."""
    folders = (workspace.reading_folder(trial.run, trial.reading) for trial in trials)
    return f"{label}={','.join(dict.fromkeys(map(str, folders)))}"


def make_row(trials: Sequence[Trial], workspace: Workspace) -> Row:
    """Collect the facts of one method's runs.

    Args:
        trials: Of one model, with one label.
        workspace: Where the runs are.

    Returns:
        The row, of all its subjects and seeds.
    """
    # Subjects may share a run, but not a place in what is said of them.
    placed = [trial for trial in trials if not trial.run.untuned]
    tuned = {trial.run.key: trial for trial in placed}
    results = {
        key: _read(workspace.run_folder(trial.run) / RESULTS_NAME) for key, trial in tuned.items()
    }
    logs: dict[str, list[tuple[Mapping[str, Any], ...]]] = {}
    records: dict[str, int] = {}
    for trial in placed:
        result = results[trial.run.key]
        logs.setdefault(trial.subject, []).append(tuple(result["log_history"]))
        records[trial.subject] = result["data"]["used"]
    first = next(iter(results.values()), None)
    prefix = "routing_weight/layer_"
    named = {name for log in logs.values() for entry in log[0] for name in entry}
    return Row(
        label=trials[0].label,
        point=trials[0].point,
        runs=tuple(dict.fromkeys(trial.run.key for trial in trials)),
        seeds=tuple(dict.fromkeys(trial.seed for trial in trials)),
        trainable=first["ledger"]["total"] if first is not None else 0,
        late_layers=tuple(
            sorted(int(name.removeprefix(prefix)) for name in named if name.startswith(prefix))
        ),
        records=records,
        steps={
            subject: max((entry["step"] for entry in seeds[0]), default=0)
            for subject, seeds in logs.items()
        },
        seconds=mean(read_seconds(workspace.run_folder(trial.run)) for trial in tuned.values())
        if tuned
        else 0.0,
        logs={subject: tuple(seeds) for subject, seeds in logs.items()},
        speeds=tuple(_read_speeds(tuned.values(), workspace)),
    )


def list_logs(trials: Sequence[Trial], workspace: Workspace) -> Iterator[RunLog]:
    """Read what each run logged, once for all rows and subjects that share it.

    Args:
        trials: Of one model; their runs must be finished.
        workspace: Where the runs are.

    Yields:
        One log for each training run.
    """
    tuned: dict[str, list[Trial]] = {}
    for trial in trials:
        if not trial.run.untuned:
            tuned.setdefault(trial.run.key, []).append(trial)
    for key, places in tuned.items():
        entries = _read(workspace.run_folder(places[0].run) / RESULTS_NAME)["log_history"]
        yield RunLog(
            run=key,
            methods=tuple(dict.fromkeys(trial.label for trial in places)),
            subjects=tuple(dict.fromkeys(trial.subject for trial in places)),
            seed=places[0].seed,
            entries=tuple(entries),
        )


def _list_versions(trials: Sequence[Trial], workspace: Workspace) -> dict[str, tuple[str, ...]]:
    """List the packages that runs and their evaluations name, with each version once."""
    named = []
    for trial in trials:
        reading = workspace.reading_folder(trial.run, trial.reading)
        named.append(_read(reading / EVALUATION_NAME)["depthmix"].get("packages", {}))
        if not trial.run.untuned:
            named.append(_read(workspace.run_folder(trial.run) / RESULTS_NAME)["versions"])
    names = dict.fromkeys(name for one in named for name in one)
    return {name: tuple(sorted({one[name] for one in named if name in one})) for name in names}


def _read_speeds(trials: Any, workspace: Workspace) -> list[GenerationSpeed]:
    """Read the timed generation of each run under its row's Top-K."""
    speeds = []
    for trial in trials:
        if not trial.reading.speed:
            continue
        own = trial.reading.top_k or trial.run.settings["mode"].get("top_k")
        entries = _read(workspace.speed_file(trial.run, trial.reading))
        speeds += [GenerationSpeed(**entry) for entry in entries if entry["top_k"] == own]
    return speeds


def _read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))
