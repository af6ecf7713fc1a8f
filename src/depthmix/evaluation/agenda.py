"""The tasks of a plan, ready to run, and what their results depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from depthmix.data.catalog import load_split, name_source
from depthmix.data.spec import EvaluationSpec
from depthmix.data.templates import load_evaluation_records, render_prompt
from depthmix.evaluation.conversations import MTBenchSpec
from depthmix.evaluation.judge import Judge
from depthmix.evaluation.names import DATA_SETS, JUDGED_METRICS
from depthmix.evaluation.plan import EvaluationPlan
from depthmix.evaluation.tasks import records_config, task_config
from depthmix.models.loading import load_tokenizer
from depthmix.models.spec import ModelSpec
from depthmix.models.template import recall_template

OWN_RECORDS = "records"
"""Name of the task of the user's own records."""


def prepare_tasks(
    plan: EvaluationPlan, spec: ModelSpec
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Configure every named set and the own records, before a model is loaded."""
    for name in plan.names:
        if name in JUDGED_METRICS:
            _check_judged(name, plan, spec)
            yield name, []
        else:
            yield (
                name,
                task_config(
                    name,
                    protocol=plan.protocol,
                    num_fewshot=plan.num_fewshot,
                    data_dir=plan.data_dir,
                ),
            )
    if plan.records is not None:
        own = EvaluationSpec(data=plan.records, metric=plan.metric, num_items=plan.limit)
        asked = recall_template(spec, plan.template)
        records = load_evaluation_records(
            own, asked.template, load_tokenizer(spec), variables=asked.variables
        )
        yield OWN_RECORDS, records_config(records, metric=plan.metric)


def describe_data(name: str, plan: EvaluationPlan, spec: ModelSpec) -> dict[str, Any]:
    """Say what a task's results depend on beside the model and the plan's settings."""
    if name == OWN_RECORDS:
        assert plan.records is not None  # or there were no such task
        path = Path(plan.records).expanduser()
        content = path.read_bytes() if path.is_file() else plan.records.encode()
        facts = {"source": path.name, "sha256": hashlib.sha256(content).hexdigest()}
        template = recall_template(spec, plan.template).template
        return {**facts, "metric": plan.metric, "template": template}
    data_set = DATA_SETS.get(name, name)
    facts: dict[str, Any] = {
        "source": name_source(data_set, data_dir=plan.data_dir),
        "num_records": len(load_split(data_set, data_dir=plan.data_dir)),
    }
    if name in JUDGED_METRICS:
        assert plan.judge is not None  # the plan has checked it
        options = ("model", "temperature", "max_tokens")
        facts["judge"] = {option: getattr(plan.judge, option) for option in options}
    if name == "mt_bench":
        answers = asdict(plan.mt_bench or MTBenchSpec())
        facts["answers"] = {k: value for k, value in answers.items() if k != "batch_size"}
    return facts


def _check_judged(name: str, plan: EvaluationPlan, spec: ModelSpec) -> None:
    """Check what a judged benchmark needs before any other runs for hours."""
    assert plan.judge is not None  # the plan has checked it
    Judge(plan.judge, Path())  # makes no folder before its first answer
    load_split(DATA_SETS.get(name, name), data_dir=plan.data_dir)
    if name == "mt_bench":
        load_split(name, "judge_prompts", data_dir=plan.data_dir)
        if (plan.mt_bench or MTBenchSpec()).template == "chat":
            question = {"prompt": [{"role": "user", "content": "Hello"}]}
            render_prompt(question, "chat", load_tokenizer(spec))
