"""How a run compares with the runs beside it, wherever both were measured on the same items."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from depthmix.comparison.comparison import compare_outcomes
from depthmix.comparison.folders import is_run, list_neighbours, load_evaluations
from depthmix.comparison.methods import check_comparable, label_outcomes
from depthmix.comparison.scores import Comparison
from depthmix.evaluation.identity import UNTUNED, count_devices, join_batch
from depthmix.evaluation.reading import printable
from depthmix.evaluation.result import PRETRAINED_NAME, EvaluationResult
from depthmix.files.runs import RUN_CONFIG_NAME
from depthmix.training.config import load_run_config

MOST_SETTINGS = 3
"""Settings that a label names at most to tell methods apart; folders do it beyond."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A run beside its baselines, on one set of items."""

    methods: Mapping[str, tuple[EvaluationResult, ...]]
    """The evaluations by label of their method, this run's first. A method may have several seeds;
    of this run's method, the first evaluation is the run's own."""

    comparison: Comparison
    """Scores of `methods`; differences are from this run's method."""

    left_out: Mapping[str, str] = field(default_factory=dict)
    """Evaluations that cannot be compared, by folder, and why."""

    @property
    def run(self) -> str:
        """Label of this run's method."""
        return next(iter(self.methods))

    @property
    def rivals(self) -> tuple[str, ...]:
        """Labels of what is not the same method read out in another way, best first."""
        row = self.comparison.rows[-1]
        sign = -1 if row.is_loss else 1
        means = {score.method: sign * score.mean for score in row.scores}
        own = self.methods[self.run][0]
        tuned = {own.adapter, own.settings} - {None}
        others = [
            label
            for label, runs in self.methods.items()
            if label != self.run and not tuned & {runs[0].adapter, runs[0].settings}
        ]
        return tuple(sorted(others, key=lambda label: -means[label]))


def judge_run(run: Path, baselines: Sequence[Path] | None = None) -> tuple[Verdict, ...]:
    """Compare a run with others, evaluation by evaluation.

    Args:
        run: Folder of a run with evaluations in it, of `depthmix evaluate`, of training, or both.
        baselines: Folders of other runs; `None` takes all that lie in the same folder.

    Returns:
        One verdict for each of the run's own evaluations as a whole, that of training last.
        Evaluations of its single layers, of other seeds and of other methods stand beside it where
        they have the same items.

    Raises:
        ValueError: If an evaluation of the run itself is damaged.
        OSError: If a baseline that was named is no run.
    """
    others = list_neighbours(run) if baselines is None else list(baselines)
    for folder in others:
        if not is_run(folder):
            raise FileNotFoundError(
                f"`baselines` must be folders of runs, and {folder} holds neither "
                f"{RUN_CONFIG_NAME} nor evaluation/; name another, or leave it out."
            )
    own = load_evaluations(run)
    candidates, left_out = list(own), {}
    for folder in others:
        try:
            found = load_evaluations(folder)
        except (ValueError, OSError) as error:
            left_out[str(folder)] = str(error)
        else:
            candidates += found
    inner = run / PRETRAINED_NAME
    wholes = [
        outcomes
        for outcomes in own
        if outcomes.layer == "ensemble"
        and inner not in outcomes.folder.parents
        and not (outcomes.folder == run and outcomes.method == UNTUNED)
    ]
    return tuple(_judge(whole, candidates, left_out) for whole in wholes)


def _judge(
    whole: EvaluationResult, candidates: Sequence[EvaluationResult], left_out: Mapping[str, str]
) -> Verdict:
    """Set one evaluation beside all that have the same items."""
    kept, reasons = [whole], dict(left_out)
    for other in candidates:
        is_other_kind = other.protocol != whole.protocol or not other.tasks.keys() & whole.tasks
        if other is whole or is_other_kind:
            continue  # another kind of evaluation has a verdict of its own
        try:
            _check_alike(whole, other)
        except ValueError as error:
            reasons[str(other.folder)] = str(error)
        else:
            kept.append(other)
    methods = _group(kept)
    comparison = compare_outcomes(methods, tasks=list(whole.tasks))
    return Verdict(methods=methods, comparison=comparison, left_out=reasons)


def _check_alike(whole: EvaluationResult, other: EvaluationResult) -> None:
    """Check that an evaluation has all tasks of another, with the same items."""
    if missing := [task for task in whole.tasks if task not in other.tasks]:
        raise ValueError(f"It lacks {', '.join(missing)}.")
    for task in whole.tasks:
        check_comparable(whole, other, task)


def _group(kept: Sequence[EvaluationResult]) -> dict[str, tuple[EvaluationResult, ...]]:
    """Gather seeds of one method; what has the same label and is another method is named apart."""
    groups: dict[str, dict[tuple[object, ...], list[EvaluationResult]]] = {}
    for outcomes in kept:
        methods = groups.setdefault(label_outcomes(outcomes), {})
        settings = (outcomes.model, outcomes.settings, outcomes.dtype, outcomes.top_k)
        seeds = methods.setdefault(settings, [])
        if outcomes.seed not in [other.seed for other in seeds]:
            seeds.append(outcomes)
        elif outcomes.adapter not in [other.adapter for other in seeds]:
            methods[*settings, outcomes.folder] = [outcomes]
    named = {
        name: tuple(seeds)
        for label, methods in groups.items()
        for name, seeds in zip(_tell_apart(label, methods.values()), methods.values(), strict=True)
    }
    first, *others = named
    others.sort(key=lambda name: -_mean(named[name]))
    return {name: named[name] for name in (first, *others)}


def _tell_apart(label: str, methods: Collection[Sequence[EvaluationResult]]) -> list[str]:
    """Name methods of one label by the settings that differ, or else by their folders."""
    if len(methods) == 1:
        return [label]
    firsts = [seeds[0] for seeds in methods]
    words = [printable(outcomes.run.absolute().name) for outcomes in firsts]
    settings = [_read_settings(outcomes) for outcomes in firsts]
    keys = sorted(set().union(*settings))
    differing = [key for key in keys if len({repr(known.get(key)) for known in settings}) > 1]
    if 1 <= len(differing) <= MOST_SETTINGS and all(settings):
        words = [
            ", ".join(
                printable(f"{key.partition('.')[2]} {known[key]}")
                for key in differing
                if known.get(key) is not None
            )
            or "defaults"
            for known in settings
        ]
    if len(set(words)) < len(words):
        words = [str(outcomes.folder) for outcomes in firsts]
    return [f"{label} ({told})" for told in words]


def _read_settings(outcomes: EvaluationResult) -> dict[str, object]:
    """Read settings of model and training as one level of names, without seed and place.

    Type and Top-K are those of the evaluation. Empty if the training's are unknown.
    """
    model = {"model.dtype": outcomes.dtype, "model.top_k": outcomes.top_k}
    if outcomes.method == UNTUNED:
        return {"model.name": outcomes.model, **model}
    path = outcomes.run / RUN_CONFIG_NAME
    if not path.is_file():
        return {}
    config = asdict(load_run_config(path))
    config["training"] = join_batch(config["training"], count_devices(path.parent))
    flat = {
        f"{section}.{name}": value
        for section in ("model", "data", "mode", "training")
        for name, value in config[section].items()
        if name not in ("seed", "output_dir")
    }
    return flat | model


def _mean(seeds: Sequence[EvaluationResult]) -> float:
    """Average the scores of a method over its tasks, items and seeds; less of a loss is more."""
    scores = [
        -score if task.is_loss else score
        for run in seeds
        for task in run.tasks.values()
        for score in task.scores.values()
    ]
    return sum(scores) / len(scores)
