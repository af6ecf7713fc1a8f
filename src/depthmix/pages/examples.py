"""Items that one model answers rightly and another wrongly, with what both answered."""

from __future__ import annotations

from dataclasses import dataclass

from depthmix.evaluation.result import EvaluationResult
from depthmix.evaluation.samples import Item
from depthmix.evaluation.wordings import read_wordings
from depthmix.pages.verdict import Verdict


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one model answered."""

    method: str
    """Label of the method."""

    text: str
    """The generated text, or the choice that the model prefers."""

    correct: bool
    """Whether it was judged right."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One item with its answers."""

    task: str
    """The task that it belongs to."""

    kind: str
    """`win` if this run alone is right, `loss` if the other alone is, `item` if neither is said."""

    prompt: str
    """What the models read."""

    reference: str
    """The right answer, as text that goes on from the prompt."""

    answers: tuple[Answer, ...]
    """This run's, and the other's if there is one."""

    prompt_ids: tuple[int, ...] | None = None
    """Tokens of the prompt where it was a rendered record; `None` for a text."""


def find_examples(verdict: Verdict, rival: str, *, limit: int = 3) -> tuple[Example, ...]:
    """Find the first items on which a run and another method part.

    The run's own seed is compared with the same seed of the other method, or with its first.

    Args:
        verdict: The run beside its baselines.
        rival: Label of the other method.
        limit: Wins, and losses, to give at most.

    Returns:
        Wins first, each kind in the order of the items. Empty where scores are other than right and
        wrong.

    Raises:
        ValueError: If the items' texts cannot be read any more.
        OSError: If a file of an evaluation is missing.
    """
    ours, others = verdict.methods[verdict.run][0], verdict.methods[rival]
    theirs = next((run for run in others if run.seed == ours.seed), others[0])
    found = [(item, "win") for item in _part(ours, theirs)[:limit]]
    found += [(item, "loss") for item in _part(theirs, ours)[:limit]]
    wanted = {item for item, _ in found}
    words, others_words = read_wordings(ours, wanted), read_wordings(theirs, wanted)
    return tuple(
        Example(
            task=item[0],
            kind=kind,
            prompt=words[item].prompt,
            reference=words[item].reference,
            answers=(
                Answer(method=verdict.run, text=words[item].response, correct=kind == "win"),
                Answer(method=rival, text=others_words[item].response, correct=kind == "loss"),
            ),
            prompt_ids=words[item].prompt_ids,
        )
        for item, kind in found
    )


def first_items(verdict: Verdict, *, limit: int = 2) -> tuple[Example, ...]:
    """Give the first items that a run was measured on, right or wrong.

    Args:
        verdict: The run beside its baselines, if it has any.
        limit: Items to give at most.

    Returns:
        The items, each with this run's answer alone.

    Raises:
        ValueError: If the items' texts cannot be read any more.
        OSError: If a file of an evaluation is missing.
    """
    ours = verdict.methods[verdict.run][0]
    scores = {item: score for task in ours.tasks.values() for item, score in task.scores.items()}
    items = list(scores)[:limit]
    words = read_wordings(ours, items)
    return tuple(
        Example(
            task=item[0],
            kind="item",
            prompt=words[item].prompt,
            reference=words[item].reference,
            answers=(
                Answer(
                    method=verdict.run, text=words[item].response, correct=bool(scores[item] == 1)
                ),
            ),
            prompt_ids=words[item].prompt_ids,
        )
        for item in items
    )


def _part(right: EvaluationResult, wrong: EvaluationResult) -> list[Item]:
    """List the items that one evaluation has right and the other wrong, in order."""
    return [
        item
        for task in right.tasks
        if task in wrong.tasks
        for item, score in right.tasks[task].scores.items()
        if score == 1 and wrong.tasks[task].scores.get(item) == 0
    ]
