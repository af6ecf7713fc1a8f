"""One page about one run: what was trained, what it gained, and how to run it again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic_core import to_jsonable_python

from depthmix.analysis.figures import (
    accuracies,
    routed_layers,
    routing_weights,
    training_loss,
)
from depthmix.analysis.style import to_svg
from depthmix.evaluation.scoring import Evaluation
from depthmix.evaluation.statistics import Interval, paired_difference
from depthmix.run_config import RunConfig

if TYPE_CHECKING:
    from depthmix.training import TrainResult
else:
    TrainResult = Any  # importing it would load the trainers, which a page does not need

METHODS = {"mode": "Mixture-of-Depths Ensemble", "lora": "LoRA without the mixture"}
METRICS = {
    "exact_match": "generated greedily, right if the final number or text is the reference",
    "choices": "right if the true choice has the highest likelihood per byte",
}
LONGEST_TEXT = 600
"""Characters of a prompt or response that the page shows."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One evaluation item with the answers of both models."""

    prompt: str
    """The question."""

    reference: str
    """The right answer."""

    before: str
    """Response of the model before training."""

    after: str
    """Response of the trained model."""

    before_correct: bool
    """Whether the first response was judged right."""

    after_correct: bool
    """Whether the second response was judged right."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the page says, as plain data."""

    title: str
    """Heading of the page."""

    model: str
    """Name of the model that was trained."""

    method: str
    """How it was trained, in words."""

    facts: Mapping[str, str]
    """Further settings worth a line each: name and value, in words."""

    ledger: str
    """Table of the trained parameters, as `str(ledger)` prints it; empty for none."""

    log_history: Sequence[Mapping[str, Any]]
    """The trainer's log."""

    before: Evaluation | None = None
    """Evaluation before training; `None` if there was none."""

    after: Evaluation | None = None
    """Evaluation after training, of the same items."""

    samples: Sequence[Sample] = ()
    """Items to show with both answers."""

    seconds: float
    """Wall time of the run."""

    command: str
    """What to type to run it again."""

    config: str
    """The resolved configuration, as JSON."""


def report_from_result(
    result: TrainResult,
    config: RunConfig,
    *,
    command: str,
    records: Sequence[Mapping[str, Any]] = (),
    num_samples: int = 6,
    seconds: float | None = None,
    title: str | None = None,
) -> Report:
    """Collect what a report says from the result of a run.

    Args:
        result: What `train` returned.
        config: The settings it was given.
        command: What to type to run it again.
        records: The evaluation records; the first ones are shown with both answers.
        num_samples: How many of them.
        seconds: Wall time; `None` takes that of `train`.
        title: Heading of the page; `None` makes one from the model's name.

    Returns:
        The report, ready for `write_report`.
    """
    layers = routed_layers(result.log_history)
    steps = max((entry.get("step", 0) for entry in result.log_history), default=0)
    facts = {
        "Late layers": ", ".join(map(str, layers)),
        "Training data": Path(config.data.train).name,
        "Optimizer steps": f"{steps:,}",
        "Learning rate": f"{config.training.get('learning_rate', '')}",
        "Weights": config.model.dtype,
    }
    name = Path(config.model.name).name
    return Report(
        title=title or f"Tuning {name}",
        model=name,
        method=METHODS[config.method],
        facts={name: value for name, value in facts.items() if value},
        ledger=str(result.ledger),
        log_history=result.log_history,
        before=result.before,
        after=result.after,
        samples=_pick_samples(records[:num_samples], result.before, result.after),
        seconds=result.metrics["total_seconds"] if seconds is None else seconds,
        command=command,
        config=json.dumps(to_jsonable_python(asdict(config)), indent=2),
    )


def write_report(report: Report, path: Path) -> Path:
    """Write the report as one HTML page that needs no other file and no network.

    Args:
        report: What to say.
        path: The file to write; its folder is made if missing.

    Returns:
        The written file.
    """
    environment = Environment(
        loader=PackageLoader("depthmix", "analysis"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"share": _share, "interval": _interval, "clip": _clip}
    page = environment.get_template("report.html").render(
        report=report,
        metric=METRICS[report.after.metric] if report.after else "",
        difference=_describe_difference(report),
        duration=_duration(report.seconds),
        figures=_draw(report),
        ledger=_split_table(report.ledger),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _draw(report: Report) -> dict[str, Markup]:
    """Draw the figures for which there is data."""
    figures = {}
    evaluations = {"before": report.before, "after": report.after}
    bars = {
        name: (evaluation.accuracy, evaluation.interval.low, evaluation.interval.high)
        for name, evaluation in evaluations.items()
        if evaluation is not None
    }
    if bars:
        figures["accuracy"] = accuracies(bars)
    if any("loss" in entry for entry in report.log_history):
        figures["loss"] = training_loss(report.log_history)
    if routed_layers(report.log_history):
        figures["routing"] = routing_weights(report.log_history)
    # The figures are ours; every text of the run goes through the template's escaping.
    return {name: Markup(to_svg(figure)) for name, figure in figures.items()}


def _describe_difference(report: Report) -> dict[str, str] | None:
    """Put the gain in accuracy into words, in percentage points."""
    if report.before is None or report.after is None:
        return None
    difference = paired_difference(report.before.correct, report.after.correct)
    low, high = difference.interval.low, difference.interval.high
    p_value = difference.p_value
    return {
        "estimate": _points(difference.estimate),
        "interval": f"{_points(low)} to {_points(high)}",
        "p_value": "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}",
    }


def _pick_samples(
    records: Sequence[Mapping[str, Any]], before: Evaluation | None, after: Evaluation | None
) -> tuple[Sample, ...]:
    """Lay each record beside the two models' answers to it."""
    if before is None or after is None:
        return ()
    return tuple(
        Sample(
            prompt=record["prompt"].removesuffix("Answer:").removeprefix("Question:").strip(),
            reference=str(
                record["choices"][record["answer"]] if "choices" in record else record["answer"]
            ),
            before=before.responses[item],
            after=after.responses[item],
            before_correct=before.correct[item],
            after_correct=after.correct[item],
        )
        for item, record in enumerate(records)
    )


def _split_table(text: str) -> list[list[str]]:
    """Split a printed table into its cells, which lie at least two spaces apart."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]


def _share(value: float) -> str:
    """Write a share in percent: 0.071 is 7.1 %, 0.5 is 50 %."""
    return f"{round(100 * value, 1):g} %"


def _points(value: float) -> str:
    """Write a difference of shares in whole percentage points, with a true minus."""
    return f"{round(100 * value):+d}".replace("-", "−").replace("+0", "0")  # noqa: RUF001


def _interval(interval: Interval) -> str:
    """Write an interval of shares in percent."""
    return f"{100 * interval.low:.0f}–{100 * interval.high:.0f} %"  # noqa: RUF001


def _clip(text: str) -> str:
    """Keep the beginning of a long text."""
    text = text.strip()
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT].rstrip()} …"


def _duration(seconds: float) -> str:
    """Write a duration in the units one would say it in."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "min"), (rest if not hours else 0, "s"))
    return " ".join(f"{number} {unit}" for number, unit in parts if number) or "under 1 s"
