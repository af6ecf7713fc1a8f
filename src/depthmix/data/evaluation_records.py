"""From records to what is asked of a model, and what it is measured by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from depthmix.data.forms import (
    CHAT_FIELDS,
    Record,
    is_messages,
    name_fields,
    to_prompt_and_completion,
)
from depthmix.data.items import check_choices
from depthmix.data.records import load_records
from depthmix.data.rendering import continue_prompt, tokenise_example
from depthmix.data.spec import EvaluationSpec, Metric, TrainingTemplate
from depthmix.data.templates import render_prompt

SHORT = 5
"""Words of an answer up to which a generated one can be compared with it as a whole."""

NEEDED = {
    "exact_match": "`prompt` (or `instruction`) and `answer`, or a form of training records whose "
    "last text is the answer,",
    "choices": "`prompt` (or `instruction`), `choices` (a list of texts) and `answer` (its index)",
    "loss": "a form of training records (`prompt` and `completion`, `messages`, `instruction` and "
    "`output`), or `prompt` and `answer`,",
}
"""The fields of a metric, for messages."""


def load_evaluation_records(
    section: EvaluationSpec,
    template: TrainingTemplate,
    tokenizer: PreTrainedTokenizerBase,
    *,
    variables: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Read evaluation records and check that they fit their metric.

    Args:
        section: File, metric and number of items.
        template: The one used in training. Prompts are rendered by it.
        tokenizer: The model's, with its chat template.
        variables: Further variables of the chat template, where a record sets no others.

    Returns:
        As `render_evaluation_records`.

    Raises:
        ValueError: As `render_evaluation_records`.
    """
    records = load_records(section.data, split="test", limit=section.num_items)
    metric = section.metric or choose_metric(records)[0]
    return render_evaluation_records(
        records, metric, template, tokenizer, source=section.data, variables=variables
    )


def choose_metric(records: Sequence[Record]) -> tuple[Metric, str]:
    """Choose how records are measured where nothing is said.

    Args:
        records: As they are read.

    Returns:
        `choices` where there are some; `exact_match` where every answer is a number or has at most
        `SHORT` words; `loss` for free text. And the reason, in words.
    """
    if any(record.get("choices") is not None for record in records):
        return "choices", "there are choices"
    answers = [find_answer(record) for record in records]
    if all(answer and _is_short(answer) for answer in answers):
        return "exact_match", f"no answer has more than {SHORT} words"
    return "loss", f"some answers have more than {SHORT} words"


def find_answer(record: Record) -> str:
    """Take the right answer out of a record of any form.

    Args:
        record: With `answer`, or as for training.

    Returns:
        Its `answer`, or what training would learn: `completion`, `output`, or the assistant's last
        message; empty if there is none.
    """
    for name in ("answer", "completion", "output"):
        if record.get(name) not in (None, ""):
            value = record[name]
            return str(value[-1].get("content") or "") if is_messages(value) else str(value)
    messages = record.get("messages")
    answered = is_messages(messages) and messages and messages[-1]["role"] == "assistant"
    content = messages[-1].get("content") if messages and answered else None
    return content if isinstance(content, str) else ""


def render_evaluation_records(
    records: Sequence[Record],
    metric: Metric,
    template: TrainingTemplate,
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str,
    variables: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Render evaluation records for a metric.

    Args:
        records: In a form of training, or with `prompt` or `instruction` and `answer`.
        metric: How they are measured.
        template: The one used in training.
        tokenizer: The model's, with its chat template.
        source: Where they come from, for messages.
        variables: Further variables of the chat template, where a record sets no others.

    Returns:
        Records with `prompt` as text and `prompt_ids` as the tokens that the model reads; for
        `exact_match` also `answer`; for `choices` also `choices`, `answer`, and their tokens as
        `choice_ids`; for `loss` also `completion`, and its tokens with the end as `completion_ids`,
        those that training would learn.

    Raises:
        ValueError: If a record has not the fields that the metric needs, or cannot be rendered.
    """
    if metric == "choices":
        check_choices(records, source)
    render = RENDERERS[metric]
    rows = []
    for number, record in enumerate(records, start=1):
        try:
            row = render(record, number, template, tokenizer, variables)
        except ValueError as error:
            own = f"Record {number} "
            said = str(error).removeprefix(own) if str(error).startswith(own) else f": {error}"
            raise ValueError(f"{own}of {source} {said}".replace(" : ", ": ")) from error
        if row is None:
            raise ValueError(
                f"Evaluation records need {NEEDED[metric]} for the metric {metric}, and record "
                f"{number} of {source} has {name_fields(record)}."
            )
        rows.append(row)
    return rows


def _render_exact_match(
    record: Record,
    number: int,
    template: TrainingTemplate,
    tokenizer: PreTrainedTokenizerBase,
    variables: Mapping[str, Any] | None,
) -> dict[str, Any] | None:
    """Render a question that is answered freely."""
    asked, answer = find_question(record), find_answer(record)
    if asked is None or not answer.strip():
        return None
    prompt = render_prompt(asked, template, tokenizer, variables=variables)
    return {
        **record,
        "prompt": prompt.text,
        "answer": answer,
        "prompt_ids": list(prompt.token_ids),
    }


def _render_choices(
    record: Record,
    number: int,
    template: TrainingTemplate,
    tokenizer: PreTrainedTokenizerBase,
    variables: Mapping[str, Any] | None,
) -> dict[str, Any] | None:
    """Render a question with the choices that continue it."""
    asked, choices = find_question(record), record.get("choices")
    answer = _to_index(record.get("answer"))
    if asked is None or not isinstance(choices, list) or answer not in range(len(choices)):
        return None
    prompt = render_prompt(asked, template, tokenizer, variables=variables)
    return {
        **record,
        "prompt": prompt.text,
        "answer": answer,
        "prompt_ids": list(prompt.token_ids),
        "choice_ids": [list(continue_prompt(prompt, text, tokenizer)) for text in choices],
    }


def _render_loss(
    record: Record,
    number: int,
    template: TrainingTemplate,
    tokenizer: PreTrainedTokenizerBase,
    variables: Mapping[str, Any] | None,
) -> dict[str, Any] | None:
    """Render what training would learn of a record, with its end."""
    learnt = dict(record)
    messages = record.get("messages")
    is_training = {"prompt", "completion"} <= record.keys()
    is_training |= {"instruction", "output"} <= record.keys()
    if is_messages(messages) and messages:
        is_training |= messages[-1]["role"] == "assistant"
    if not is_training:
        answer = find_answer(record)
        if find_question(record) is None or not answer.strip():
            return None
        if "prompt" not in record and "instruction" not in record:
            learnt["messages"] = [*(messages or []), {"role": "assistant", "content": answer}]
        else:
            learnt["completion" if "prompt" in record else "output"] = answer
    given, completion = to_prompt_and_completion(learnt, number, template, variables=variables)
    rendering = tokenise_example(given, completion, tokenizer)
    text = completion if isinstance(completion, str) else completion[-1].get("content") or ""
    return {
        "prompt": rendering.prompt.text,
        "completion": text,
        "prompt_ids": list(rendering.token_ids[: rendering.num_given]),
        "completion_ids": list(rendering.token_ids[rendering.num_given :]),
    }


RENDERERS: dict[str, Callable[..., dict[str, Any] | None]] = {
    "exact_match": _render_exact_match,
    "choices": _render_choices,
    "loss": _render_loss,
}
"""By metric, what renders a record; `None` where it lacks a field."""


def find_question(record: Record) -> dict[str, Any] | None:
    """Take the question out of a record, as `render_prompt` takes it; None if there is none."""
    for name in ("prompt", "instruction"):
        if isinstance(record.get(name), str | list):
            return dict(record)
    messages = record.get("messages")
    if not is_messages(messages) or not messages:
        return None
    given = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    fields = {name: record[name] for name in CHAT_FIELDS if name in record}
    return {"prompt": given, **fields} if given else None


def _is_short(answer: str) -> bool:
    """Tell whether an answer is a number or a few words on one line."""
    return len(answer.split()) <= SHORT and "\n" not in answer.strip()


def _to_index(answer: Any) -> int | None:
    """Read an index; CSV files hold it as text."""
    if isinstance(answer, str) and answer.isdecimal():
        return int(answer)
    return answer if isinstance(answer, int) and not isinstance(answer, bool) else None
