"""What the YAML files of tasks call: reading records, extracting answers, judging them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from lm_eval.api.filter import Filter
from lm_eval.api.registry import register_filter, register_metric

from depthmix.data.catalog import describe, load_split
from depthmix.data.forms import ALPACA_PROMPT
from depthmix.data.instructions import INSTRUCTIONS
from depthmix.evaluation.answers import is_correct
from depthmix.evaluation.extraction import first_word, last_number, stated_letter, stated_number
from depthmix.evaluation.numbers import is_close_number, is_same_number

UNANSWERED = "[invalid]"
"""lm-eval's word for a text without an answer."""

RULES: dict[str, Callable[..., str | None]] = {
    "stated_number": stated_number,
    "stated_letter": stated_letter,
    "last_number": last_number,
    "first_word": first_word,
}
"""Rules of extraction that a YAML file may name."""


def read_records(
    *,
    name: str,
    splits: Mapping[str, str],
    data_dir: str | None = None,
    subject: str | None = None,
    **_: Any,
) -> dict[str, Dataset]:
    """Read a named data set for a task.

    Args:
        name: Name in the catalogue.
        splits: The catalogue's name of each split, by the task's name of it.
        data_dir: As for `load_split`.
        subject: Keep the records of this subject alone.
        _: The task's metadata, which lm-eval passes as well.

    Returns:
        Records by the task's name of their split.
    """
    data = {}
    for split, source in splits.items():
        records = load_split(name, source, data_dir=data_dir)
        data[split] = Dataset.from_list(
            [record for record in records if subject in (None, record.get("subject"))]
        )
    return data


def read_instructions(*, name: str, data_dir: str | None = None, **_: Any) -> dict[str, Dataset]:
    """Read a data set's test split as LLM-Adapters has it.

    Args:
        name: Name in the catalogue.
        data_dir: As for `load_split`.
        _: The task's metadata, which lm-eval passes as well.

    Returns:
        Records with `instruction`, its text where the source is LLM-Adapters, and `answer`, under
        `test`.
    """
    instruct = INSTRUCTIONS[describe(name).form]
    records = [(record, instruct(record)) for record in load_split(name, data_dir=data_dir)]
    rows = [
        {"instruction": record.get("instruction", made["instruction"]), "answer": made["answer"]}
        for record, made in records
    ]
    return {"test": Dataset.from_list(rows)}


def write_alpaca_prompt(doc: Mapping[str, Any]) -> str:
    """Write a record's instruction in Alpaca's prompt."""
    return ALPACA_PROMPT.format(instruction=doc["instruction"])


@register_filter("depthmix_answer")
class AnswerFilter(Filter):
    """Reduce each response to its answer, by one of `RULES`."""

    def __init__(self, rule: str, **options: Any) -> None:
        self.extract = partial(RULES[rule], **options)

    def apply(
        self, resps: Iterable[Sequence[str]], docs: Sequence[Mapping[str, Any]]
    ) -> list[list[str]]:
        """Extract the answers of all responses of all records."""
        return [[self.extract(text) or UNANSWERED for text in texts] for texts in resps]


@register_metric(
    metric="answered", higher_is_better=True, output_type="generate_until", aggregation="mean"
)
def count_answered(references: Sequence[str], predictions: Sequence[str]) -> int:
    """Count an extracted answer, for lm-eval's own tasks, which judge without `judge_number`."""
    return int(predictions[0] != UNANSWERED)


def judge_number(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, int]:
    """Judge an extracted number by the rules of the protocol `default`."""
    return _judge(results[0], partial(is_same_number, reference=doc["answer"]))


def judge_close_number(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, int]:
    """Judge an extracted number by the rules of the protocol `llm-adapters`."""
    return _judge(results[0], partial(is_close_number, reference=doc["answer"]))


def judge_word(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, int]:
    """Judge an extracted letter or word, which must be the answer itself."""
    return _judge(results[0], doc["answer"].__eq__)


def judge_response(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, int]:
    """Judge a response to one of the user's own records."""
    return {"exact_match": int(is_correct(results[0], doc["answer"]))}


def judge_choices(
    doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]
) -> dict[str, float]:
    """Judge the likelihoods of one's own choices, as lm-eval does, and give that of the right."""
    choices, right = doc["choices"], doc["answer"]
    sums = np.array([log_likelihood for log_likelihood, _ in results])
    lengths = {
        "acc": np.ones(len(choices)),
        "acc_norm": np.array([len(choice) for choice in choices]),
        "acc_bytes": np.array([len(choice.encode()) for choice in choices]),
    }
    scores = {name: float(np.argmax(sums / by) == right) for name, by in lengths.items()}
    if "choice_ids" in doc:
        scores["nll"] = float(-sums[right] / len(doc["choice_ids"][right]))
    return scores


def judge_loss(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """Give the loss of one of the user's own texts, in nats per token."""
    ((log_likelihood, _),) = results
    return {"nll": -log_likelihood / len(doc["completion_ids"])}


def _judge(answer: str, is_right: Callable[[str], bool]) -> dict[str, int]:
    """Give both metrics of one answer."""
    answered = answer != UNANSWERED
    return {"exact_match": int(answered and is_right(answer)), "answered": int(answered)}
