"""The tasks of a plan, ready to run, and what their results depend on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from depthmix.data.catalog import load_split, name_source
from depthmix.data.spec import EvaluationSpec
from depthmix.data.templates import render_prompt
from depthmix.evaluation.conversations import MTBenchSpec
from depthmix.evaluation.judge import Judge
from depthmix.evaluation.names import DATA_SETS, JUDGED_METRICS
from depthmix.evaluation.own_records import OWN_RECORDS, prepare_own_records
from depthmix.evaluation.plan import EvaluationPlan
from depthmix.evaluation.tasks import task_config
from depthmix.models.loading import load_tokenizer
from depthmix.models.spec import ModelSpec
from depthmix.models.template import recall_template


def prepare_tasks(
    plan: EvaluationPlan, spec: ModelSpec
) -> Iterator[tuple[str, list[dict[str, Any]], dict[str, Any]]]:
    """Configure every named set and the own records, before a model is loaded.

    Args:
        plan: What to measure.
        spec: The model.

    Yields:
        Each task's name, its configurations (none where a judge rates it), and what its results
        depend on beside the model and the plan's settings.
    """
    for name in plan.names:
        configs: list[dict[str, Any]] = []
        if name in JUDGED_METRICS:
            _check_judged(name, plan, spec)
        else:
            configs = task_config(
                name,
                protocol=plan.protocol,
                num_fewshot=plan.num_fewshot,
                data_dir=plan.data_dir,
            )
        yield name, configs, _describe_data(name, plan)
    if plan.records is not None:
        own = EvaluationSpec(
            data=plan.records,
            metric=plan.metric,
            num_items=plan.limit,
            max_new_tokens=plan.max_new_tokens,
        )
        asked = recall_template(spec, plan.template)
        prepared = prepare_own_records(
            own, asked.template, load_tokenizer(spec), variables=asked.variables
        )
        if prepared.notice is not None:
            print(prepared.notice, file=sys.stderr)
        yield OWN_RECORDS, list(prepared.configs), dict(prepared.data)


def _describe_data(name: str, plan: EvaluationPlan) -> dict[str, Any]:
    """Say what a named set's results depend on beside the model and the plan's settings."""
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
