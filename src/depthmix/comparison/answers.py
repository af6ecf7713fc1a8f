"""Did it help? What a comparison says of tuning as a whole, and of the mixture, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from depthmix.comparison.comparison import compare_outcomes
from depthmix.comparison.methods import read_methods
from depthmix.comparison.scores import MethodScore
from depthmix.comparison.written_numbers import (
    write_ends,
    write_ends_in_nats,
    write_nats,
    write_percent,
)
from depthmix.evaluation.identity import UNTUNED
from depthmix.evaluation.result import EvaluationResult
from depthmix.statistics.intervals import Interval, holm

MIXTURE = "MoDE"
"""How the label of a method with a mixture ends."""

LIMIT = 0.05
"""Largest p-value, corrected for the number of questions, of a difference that counts."""

Question = Literal["tuning", "mixture"]
"""`tuning`: a tuned model beside the pretrained one. `mixture`: one with a mixture beside LoRA
alone."""

WORDS = {
    "tuning": {
        "better": "Tuning as a whole helped",
        "worse": "Tuning as a whole did harm",
        "open": "Whether tuning as a whole helped is open",
    },
    "mixture": {
        "better": "The mixture helped beside LoRA alone",
        "worse": "The mixture did harm beside LoRA alone",
        "open": "Whether the mixture adds anything to LoRA alone is open",
    },
}
"""What is said of each question."""

UNMEASURED = {
    "tuning": "What tuning as a whole gave is not measured here: the pretrained model is not among "
    "what is compared; add `RUN/pretrained`.",
    "mixture": "What the mixture adds to LoRA alone is not measured here: train the same run with "
    "`--method lora`, and compare the two.",
}
"""What is said where there is nothing to compare with."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A method beside one that it is to be better than, on the same items."""

    question: Question
    """What is asked."""

    method: str
    """Label of the method that is asked about."""

    rival: str
    """Label of the one that it is to be better than."""

    score: MethodScore
    """What the method has."""

    rival_score: MethodScore
    """What the other has."""

    lead: float
    """Difference of the two in the method's favour: of scores, or of losses in nats."""

    interval: Interval
    """95 % interval of `lead`."""

    p_value: float
    """How often a difference of this size would come about between equals, by itself."""

    adjusted_p_value: float
    """The same after Holm's correction for the questions that are answered together."""

    num_items: int
    """Items that both were asked."""

    is_loss: bool
    """Whether the scores are losses in nats per token."""

    has_mixture: bool
    """Whether the method has a mixture."""

    @property
    def verdict(self) -> Literal["better", "worse", "open"]:
        """What the numbers say; `open` unless interval and corrected p-value both say it."""
        if self.interval.low <= 0 <= self.interval.high or self.adjusted_p_value >= LIMIT:
            return "open"
        return "better" if self.lead > 0 else "worse"

    @property
    def remark(self) -> str:
        """What explains numbers that seem to disagree; empty if they do not."""
        apart = not self.interval.low <= 0 <= self.interval.high
        if apart and self.adjusted_p_value >= LIMIT:
            return (
                "The interval leaves out zero, but p after Holm's correction is "
                f"{self.adjusted_p_value:.2g}: with several questions one such interval comes by "
                "chance."
            )
        if not apart and self.p_value < LIMIT:
            return (
                "The interval holds zero, though p is small: the one is a bootstrap's and the "
                "other another test's, and at the border they part."
            )
        own, other = self.score.interval, self.rival_score.interval
        if self.verdict != "open" and own.low <= other.high and other.low <= own.high:
            return (
                "The intervals of the two scores overlap all the same: both meet the same hard and "
                "easy items, which their difference leaves out."
            )
        return ""

    def __str__(self) -> str:
        """Say it in a sentence, with a second one where numbers seem to disagree."""
        small = self.p_value < 0.001
        p = "p < 0.001" if small else f"p = {self.p_value:.2g}"
        if self.is_loss:
            has = f"{write_nats(self.score.mean)} nats per token on {self.num_items:,} items"
            lead = f"{write_nats(self.lead, '+')} less ({write_ends_in_nats(self.interval, '+')})"
            other = write_nats(self.rival_score.mean)
        else:
            has = f"{write_percent(self.score.mean)} % of {self.num_items:,} items"
            lead = f"{write_percent(self.lead, '+')} points ({write_ends(self.interval, '+')})"
            other = f"{write_percent(self.rival_score.mean)} %"
        said = WORDS[self.question][self.verdict]
        sentence = f"{said}: {self.method} has {has}, {self.rival} {other}; {lead}, {p}."
        return f"{sentence} {self.remark}".rstrip()


def did_it_help(
    runs: Sequence[str | Path],
    *,
    tasks: Sequence[str] | None = None,
    metric: str | None = None,
    seed: int = 0,
) -> tuple[Answer, ...]:
    """Say of evaluated runs what tuning as a whole gave, and what the mixture added.

    Args:
        runs: As `compare` takes them.
        tasks: As `compare` takes them; with several the answers are about their average.
        metric: As `compare` takes it.
        seed: Of the bootstraps' resamples.

    Returns:
        For each tuned method its answers, as far as what they need is among the runs.

    Raises:
        ValueError: As `compare` does.
        OSError: As `compare` does.
    """
    methods = read_methods(runs, tasks=tasks, metric=metric)
    return answer_questions(methods, tasks=tasks, seed=seed)


def answer_questions(
    methods: Mapping[str, Sequence[EvaluationResult]],
    *,
    about: str | None = None,
    tasks: Sequence[str] | None = None,
    seed: int = 0,
) -> tuple[Answer, ...]:
    """Answer both questions for methods that have been read.

    Args:
        methods: Evaluations by the label of their method.
        about: The method that is asked about; `None` asks about every one with a mixture, or, where
            there is none, about every tuned one.
        tasks: As for `did_it_help`.
        seed: As for `did_it_help`.

    Returns:
        The answers: of each method beside the pretrained model, and, if it has a mixture, beside
        LoRA alone.
    """
    found = []
    for question, label, rival in _pair(methods, about):
        beside = {label: methods[label], rival: methods[rival]}
        comparison = compare_outcomes(beside, tasks=tasks, seed=seed)
        row = comparison.rows[-1]
        score, other = row.scores
        assert other.difference is not None
        # A loss that is larger by so much is a lead of so much; a score the other way round.
        sign = 1 if row.is_loss else -1
        ends = sorted((sign * other.difference.interval.low, sign * other.difference.interval.high))
        found.append(
            Answer(
                question=question,
                method=label,
                rival=rival,
                score=score,
                rival_score=other,
                lead=sign * other.difference.estimate,
                interval=Interval(low=ends[0], high=ends[1]),
                p_value=other.difference.p_value,
                adjusted_p_value=other.difference.p_value,
                num_items=row.num_items,
                is_loss=row.is_loss,
                has_mixture=methods[label][0].method.endswith(MIXTURE),
            )
        )
    adjusted = holm([answer.p_value for answer in found])
    return tuple(
        replace(answer, adjusted_p_value=p_value)
        for answer, p_value in zip(found, adjusted, strict=True)
    )


def say_answers(answers: Sequence[Answer]) -> tuple[str, ...]:
    """Put answers into sentences, and say what could not be answered.

    Args:
        answers: Of one comparison.

    Returns:
        A sentence or two for each answer, and one for each question without any; nothing where
        there is no answer at all.
    """
    if not answers:
        return ()
    asked = {answer.question for answer in answers}
    has_mixture = any(answer.has_mixture for answer in answers)
    missing = [
        words
        for question, words in UNMEASURED.items()
        if question not in asked and (has_mixture or question == "tuning")
    ]
    return (*map(str, answers), *missing)


def _pair(
    methods: Mapping[str, Sequence[EvaluationResult]], about: str | None
) -> Iterator[tuple[Question, str, str]]:
    """List what is to be compared with what: a method's own kind of LoRA first."""
    whole = {name: runs[0].method for name, runs in methods.items() if _is_whole(runs[0])}
    untuned = next((name for name, kind in whole.items() if kind == UNTUNED), None)
    mixed = [name for name, kind in whole.items() if kind.endswith(MIXTURE)]
    plain = {kind: name for name, kind in whole.items() if name not in mixed and kind != UNTUNED}
    for label in mixed or plain.values() if about is None else [about] if about in whole else ():
        if untuned is not None:
            yield "tuning", label, untuned
        same = plain.get(whole[label].removesuffix(f" + {MIXTURE}"))
        rival = same or next(iter(plain.values()), None)
        if label in mixed and rival is not None:
            yield "mixture", label, rival


def _is_whole(run: EvaluationResult) -> bool:
    """Tell whether a model answered as it is, and not by one of its layers."""
    return run.layer == "ensemble" or run.method == UNTUNED
