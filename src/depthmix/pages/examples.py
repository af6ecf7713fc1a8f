"""Items that one model answers rightly and another wrongly, with what both answered."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from depthmix.comparison.outcomes import Outcomes
from depthmix.comparison.samples import Item, name_items, read_samples
from depthmix.data.templates import load_evaluation_records
from depthmix.evaluation.provenance import UNTUNED
from depthmix.files.runs import RUN_CONFIG_NAME
from depthmix.models.loading import load_tokenizer
from depthmix.models.spec import ModelSpec
from depthmix.models.template import recall_template
from depthmix.pages.verdict import DURING_TRAINING, Verdict, run_folder
from depthmix.training.config import load_run_config
from depthmix.training.folder import load_result


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


@dataclass(frozen=True, kw_only=True)
class Wording:
    """An item in words."""

    prompt: str
    """What the model read."""

    reference: str
    """The right answer."""

    response: str
    """What the model answered."""

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
        OSError: If the data of an evaluation during training are gone, or its tokenizer.
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
        OSError: If the data of an evaluation during training are gone, or its tokenizer.
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


def read_wordings(outcomes: Outcomes, items: Collection[Item]) -> dict[Item, Wording]:
    """Read what items ask, and what a model answered.

    Args:
        outcomes: An evaluation.
        items: Some of its items.

    Returns:
        Their texts.

    Raises:
        ValueError: If a text cannot be read.
        OSError: If the data of an evaluation during training are gone.
    """
    if outcomes.protocol == DURING_TRAINING:
        return _read_training(outcomes, items)
    metrics = {item[0]: task.metric for task in outcomes.tasks.values() for item in task.scores}
    wordings = {}
    for leaf in {item[0] for item in items}:
        metric = metrics[leaf].partition(" / ")[0]
        path = outcomes.folder / f"samples_{leaf}.jsonl"
        samples = read_samples(path, texts=True)
        named = name_items(leaf, metric.rpartition(",")[2], samples, outcomes.folder)
        try:
            wordings |= {item: _word(named[item], metric) for item in items if item[0] == leaf}
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"{path} must hold lm-eval's samples with their texts, and one lacks them "
                f"({error!r}); evaluate again."
            ) from error
    return wordings


def _part(right: Outcomes, wrong: Outcomes) -> list[Item]:
    """List the items that one evaluation has right and the other wrong, in order."""
    return [
        item
        for task in right.tasks
        if task in wrong.tasks
        for item, score in right.tasks[task].scores.items()
        if score == 1 and wrong.tasks[task].scores.get(item) == 0
    ]


def _word(sample: Mapping[str, Any], metric: str) -> Wording:
    """Put one of lm-eval's samples into words: a choice by likelihood, or generated text."""
    requests, target = sample["arguments"], sample["target"]
    first = target[0] if isinstance(target, list) and target else target  # of several right ones
    prompt = "\n\n".join(dict.fromkeys(str(request[0]) for request in requests))
    answers = sample["filtered_resps"]
    rendered = sample.get("doc", {}).get("prompt_ids")
    prompt_ids = None if rendered is None else tuple(rendered)
    if len(requests) > 1 and all(isinstance(answer, list) for answer in answers):
        choices = [str(request[1]) for request in requests]
        scores = [answer[0] for answer in answers]
        if metric.startswith("acc_norm"):
            scores = [s / (len(c.strip()) or 1) for s, c in zip(scores, choices, strict=True)]
        best = max(range(len(choices)), key=scores.__getitem__)
        reference = choices[first] if isinstance(first, int) else str(first)
        return Wording(
            prompt=prompt, reference=reference, response=choices[best], prompt_ids=prompt_ids
        )
    texts = [response[0] for response in sample["resps"]]
    reference = "" if first is None else str(first)  # a judge may need none
    response = "\n\n".join(map(str, texts))
    return Wording(prompt=prompt, reference=reference, response=response, prompt_ids=prompt_ids)


def _read_training(outcomes: Outcomes, items: Collection[Item]) -> dict[Item, Wording]:
    """Read the records of an evaluation during training again, beside the responses kept."""
    folder = run_folder(outcomes)
    config, result = load_run_config(folder / RUN_CONFIG_NAME), load_result(folder)
    evaluation = result.before if outcomes.method == UNTUNED else result.after
    assert config.evaluation is not None  # the outcomes come from it
    assert evaluation is not None
    spec = ModelSpec(name=str(folder))
    records = load_evaluation_records(
        config.evaluation,
        config.data.template,
        load_tokenizer(spec),
        variables=recall_template(spec).variables,
    )
    if len(records) != len(evaluation.responses):
        raise ValueError(
            f"`evaluation.data` must hold the {len(evaluation.responses)} records that {folder} "
            f"was measured on, and {config.evaluation.data} has {len(records)} now; put the old "
            "file back, or train again."
        )
    wordings = {}
    for item in items:
        place = int(item[1])
        record = records[place]
        right = record["choices"][record["answer"]] if "choices" in record else record["answer"]
        wordings[item] = Wording(
            prompt=record["prompt"],
            reference=str(right),
            response=evaluation.responses[place],
            prompt_ids=tuple(record["prompt_ids"]),
        )
    return wordings
