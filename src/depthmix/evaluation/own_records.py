"""The user's own records as a task: how they are asked, and what its results depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from depthmix.data.evaluation_records import choose_metric, render_evaluation_records
from depthmix.data.forms import find_form
from depthmix.data.records import load_records
from depthmix.data.spec import EvaluationSpec, TrainingTemplate
from depthmix.libraries.extras import require

OWN_RECORDS = "records"
"""Name of the task of the user's own records."""


WRITTEN_BY = {"prompt": "plain", "messages": "chat", "instruction": "alpaca"}
"""What `auto` takes for records of a form; by its name, so that both are the same evaluation."""


@dataclass(frozen=True, kw_only=True)
class OwnRecords:
    """Own records, ready to be asked."""

    configs: tuple[dict[str, Any], ...]
    """Their task, as `score` takes it."""

    metric: str
    """lm-eval's name of their main metric, with its filter."""

    data: Mapping[str, Any]
    """What the results depend on beside the model and the settings, in JSON's types."""

    notice: str | None
    """Which metric was chosen and why, where none was asked for."""


def prepare_own_records(
    spec: EvaluationSpec,
    template: TrainingTemplate,
    tokenizer: PreTrainedTokenizerBase,
    *,
    variables: Mapping[str, Any] | None = None,
) -> OwnRecords:
    """Read and render own records, and configure their task.

    Args:
        spec: Source, metric and number of items.
        template: How a record becomes text: as in training.
        tokenizer: The model's.
        variables: Further variables of the chat template, where a record sets no others.

    Returns:
        The task.

    Raises:
        ValueError: If a record has not the fields that its metric needs, or cannot be rendered.
        OSError: If there are no records.
        MissingExtraError: If lm-eval, or math-verify where it is needed, is not installed.
    """
    require("eval", "An evaluation", "lm_eval")
    from depthmix.evaluation.tasks import main_metric, records_config

    records = load_records(spec.data, split="test", limit=spec.num_items)
    metric, notice = spec.metric, None
    path = Path(spec.data).expanduser()
    if metric is None:
        metric, reason = choose_metric(records)
        notice = f"{path.name} is measured by `metric` {metric}, since {reason}."
    rows = render_evaluation_records(
        records, metric, template, tokenizer, source=spec.data, variables=variables
    )
    content = path.read_bytes() if path.is_file() else spec.data.encode()
    data: dict[str, Any] = {
        "source": path.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "metric": metric,
        "template": WRITTEN_BY[find_form(records)] if template == "auto" else template,
    }
    if metric == "exact_match":
        data["max_new_tokens"] = spec.max_new_tokens
    configs = records_config(rows, metric=metric, max_new_tokens=spec.max_new_tokens)
    return OwnRecords(
        configs=tuple(configs), metric=main_metric(configs[0]), data=data, notice=notice
    )
