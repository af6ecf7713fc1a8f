"""The page about one run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from markupsafe import Markup, escape

from depthmix.comparison.answers import answer_questions, say_answers
from depthmix.comparison.costs import say_costs
from depthmix.comparison.notes import notes
from depthmix.comparison.scores import Comparison
from depthmix.data.spec import Template
from depthmix.evaluation.identity import UNTUNED
from depthmix.evaluation.result import PRETRAINED_NAME, TRAINING_NAME
from depthmix.figures.style import to_svg
from depthmix.pages.examples import first_items
from depthmix.pages.lens_page import SCRIPTS, to_page_data
from depthmix.pages.page import render_page, write_page
from depthmix.pages.passages import Passage, choose_passages, entitle, read_passages
from depthmix.pages.report import Report, collect_report
from depthmix.pages.report_figures import draw_report
from depthmix.pages.verdict import Verdict
from depthmix.pages.words import Words, write_p_value

LONGEST_TEXT = 600
"""Characters of a prompt or response that the page shows."""

METRICS = {
    "exact_match,stated": "generated greedily, right if the answer that is stated is the reference",
    "nll,none": "loss of the right text, in nats per token; less is better",
    "acc_bytes,none": "right if the true choice has the highest likelihood per byte",
    # Of runs that earlier versions measured in training.
    "exact_match": "generated greedily, right if the final number or text is the reference",
    "choices": "right if the true choice has the highest likelihood per byte",
}
"""How own records are judged."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method's numbers on one task, in words."""

    task: str
    method: str
    is_run: bool
    seeds: str
    trainable: str
    accuracy: str
    lead: str
    p_value: str


def show_report(
    run: Path,
    *,
    baselines: Sequence[Path] | None = None,
    texts: Sequence[str] = (),
    template: Template | None = None,
    layers: str | Sequence[int] = "late",
    lens: bool = True,
    path: Path | None = None,
) -> Path:
    """Write the page about a run: training, verdict, examples, and texts token by token.

    Args:
        run: Folder of a finished run.
        baselines: Folders of runs to compare it with; `None` takes those in the same folder.
        texts: What the tuned and the pretrained model read token by token; empty takes some of the
            items on which the run and its best baseline part, with their right answers, or the
            first items of the run where there are none.
        template: What stands around these texts, by default what the run was trained with.
        layers: Layers to read out: `late` for those of the mixture, `all`, or numbers, as text with
            commas between them.
        lens: Read texts token by token, for which the model is loaded.
        path: The file to write; `None` takes `report.html` in the run's folder.

    Returns:
        The written file. Where there is no item, the model is gone, or an item is longer than it
        takes, the page says so instead of reading texts that were not given.

    Raises:
        ValueError: If a file of the run is damaged, or a layer or text that was given does not fit
            the model.
        OSError: If the run is not finished, or a baseline, or the model that is to read a text,
            cannot be found.
    """
    report = collect_report(run, baselines=baselines)
    if lens:
        try:
            passages = dict(zip(entitle(texts), texts, strict=True)) or _find_passages(report)
            lenses = read_passages(run, passages, layers=layers, template=template)
            report = replace(report, passages=lenses)
        except (ValueError, OSError) as error:
            if texts or layers != "late":
                raise  # what was asked for is not left out
            report = replace(report, missing={**report.missing, "passages": str(error)})
    return write_report(report, path or run / "report.html")


def _find_passages(report: Report) -> dict[str, Passage]:
    """Choose what to read where no text was given."""
    if not report.verdicts:
        raise ValueError(
            "There is no item to read, since the run was not evaluated; name a text by `text`."
        )
    return choose_passages(report.examples or first_items(report.verdicts[0]))


def render_report(report: Report) -> str:
    """Make the page about a run.

    Args:
        report: What to say.

    Returns:
        The page, which needs no other file and no network.
    """
    figures = {
        name: Markup(to_svg(figure, name=name)) for name, figure in draw_report(report).items()
    }
    narrow_figures = {
        name: Markup(to_svg(figure, name=f"{name}_narrow"))
        for name, figure in draw_report(report, narrow=True).items()
    }
    verdicts = [
        _put(verdict, trainable)
        for verdict, trainable in zip(report.verdicts, report.trainable, strict=True)
    ]
    duration = _duration(report.seconds)
    data = to_page_data(report.passages) if report.passages else None
    return render_page(
        "report.html",
        styles=["lens.css", "report.css"],
        scripts=SCRIPTS if report.passages else (),
        filters={"clip": _clip, "clip_prompt": _clip_prompt, "mark_code": _mark_code},
        report=report,
        narrow_figures=narrow_figures,
        figures=figures,  # ours; every text of the run goes through the template's escaping
        duration=duration,
        verdicts=verdicts,
        data=data,
    )


def write_report(report: Report, path: Path) -> Path:
    """Write the report as one HTML page that needs no other file and no network.

    Args:
        report: What to say.
        path: The file to write; its folder is made if missing.

    Returns:
        The written file.

    Raises:
        ValueError: If the page would be larger than 5 MB.
    """
    page = render_report(report)
    return write_page(page, path, way_out="pass shorter texts, or fewer layers")


def _put(verdict: Verdict, trainable: Mapping[str, int]) -> dict[str, object]:
    """Put a verdict into words: headings, cards, a table, notes."""
    comparison = verdict.comparison
    last = comparison.rows[-1]
    scores = {score.method: score for score in last.scores}
    own = scores[verdict.run]
    seeds = "this run" if own.num_seeds == 1 else f"this method, {own.num_seeds} seeds"
    words = Words(is_loss=last.is_loss)
    mean, ends = words.mean(own.mean), words.ends(own.interval)
    cards = [(seeds, mean, f"95 % interval {ends}", "main")]
    answers = answer_questions(verdict.methods, about=verdict.run, tasks=_list_tasks(comparison))
    alone = [answer.rival for answer in answers if answer.question == "mixture"]
    untuned = [label for label in verdict.rivals if label == UNTUNED]
    for label in dict.fromkeys((*verdict.rivals[:1], *alone, *untuned)):
        score = scores[label]
        assert score.difference is not None
        assert score.adjusted_p_value is not None
        lead = words.lead(score.difference.estimate, score.difference.interval)
        p = write_p_value(score.adjusted_p_value)
        led = f"lead of this run, {words.unit}: {lead}, {p}"
        cards.append((label, words.mean(score.mean), led, ""))
    rows = [
        Row(
            task=row.task if score is row.scores[0] else "",
            method=score.method,
            is_run=score.method == verdict.run,
            seeds=str(score.num_seeds),
            trainable=f"{trainable[score.method]:,}" if score.method in trainable else "",
            accuracy=f"{said.mean(score.mean)} ({said.ends(score.interval)})",
            lead=said.lead(score.difference.estimate, score.difference.interval)
            if score.difference
            else "",
            p_value="" if score.adjusted_p_value is None else write_p_value(score.adjusted_p_value),
        )
        for row in comparison.rows
        for said in [Words(is_loss=row.is_loss)]
        for score in row.scores
    ]
    metric = comparison.tasks[0].metric
    own_data = verdict.methods[verdict.run][0].tasks[comparison.tasks[0].task].data
    return {
        "title": ", ".join(row.task for row in comparison.tasks),
        "origin": f"Measured on {source}: {METRICS[metric]}."
        if (source := own_data.get("source")) and metric in METRICS
        else f"Measured by depthmix evaluate, protocol {comparison.methods[0].protocol}.",
        "answers": [*say_answers(answers), *say_costs(comparison)],
        "num_items": sum(row.num_items for row in comparison.tasks),
        "cards": cards,
        "rows": rows,
        "notes": [
            # The table shows leads instead; how p is made is true of both.
            note.rpartition("; ")[2] if note.startswith("Differences are") else note
            for note in notes(comparison)
        ],
        "left_out": [(_place(Path(folder)), why) for folder, why in verdict.left_out.items()],
        "is_broad": len(verdict.methods) > 3,  # an UpSet plot, not circles
    }


def _list_tasks(comparison: Comparison) -> list[str]:
    """List the tasks that are compared."""
    return [row.task for row in comparison.tasks]


def _place(folder: Path) -> str:
    """Name a run, or an evaluation by its run and itself."""
    if folder.parent.name != "evaluation":
        return folder.name
    run, name = folder.parents[1], folder.name
    if run.name == PRETRAINED_NAME:
        return f"{run.parent.name}, {PRETRAINED_NAME}"
    return run.name if name == TRAINING_NAME else f"{run.name}, {name}"


def _mark_code(text: str) -> Markup:
    """Escape a sentence, and mark what stands in backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _clip(text: str) -> str:
    """Keep the beginning of a long text."""
    text = text.strip()
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT].rstrip()} …"


def _clip_prompt(text: str) -> str:
    """Keep the end of a long prompt, where the question is; examples come before it."""
    text = text.strip()
    return text if len(text) <= LONGEST_TEXT else f"… {text[-LONGEST_TEXT:].lstrip()}"


def _duration(seconds: float) -> str:
    """Write a duration in the units one would say it in."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "min"), (rest if not hours else 0, "s"))
    return " ".join(f"{number} {unit}" for number, unit in parts if number) or "under 1 s"
