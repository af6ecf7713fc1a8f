"""Configurations of tasks, as `lm_eval.simple_evaluate` takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
from datasets import Dataset
from lm_eval.tasks._yaml_loader import load_yaml

from depthmix.data.catalog import describe, load_split
from depthmix.data.records import load_records
from depthmix.data.spec import Metric
from depthmix.evaluation.answers import needs_math_verify
from depthmix.evaluation.formulas import check_math_verify
from depthmix.evaluation.names import PROTOCOLS, TASKS
from depthmix.options.types import suggest

OURS = Path(__file__).parent
THEIRS = Path(lm_eval.tasks.__file__).parent

HEADLINES = ("acc_bytes", "acc_norm", "exact_match", "acc", "nll")
"""Metrics that may head a table; the first that a task has does. Own choices alone have
`acc_bytes`, and own texts `nll`."""


def _list_builtin() -> dict[str, list[str]]:
    """Name lm-eval's own files for the data sets that it has."""
    hub = describe("mmlu_stem").hub
    assert hub is not None
    return {
        "gsm8k": ["gsm8k/gsm8k.yaml"],
        "arc_easy": ["arc/arc_easy.yaml"],
        "arc_challenge": ["arc/arc_challenge.yaml"],
        "boolq": ["super_glue/boolq/default.yaml"],
        "openbookqa": ["openbookqa/openbookqa.yaml"],
        "hellaswag": ["hellaswag/hellaswag.yaml"],
        "truthfulqa": [f"truthfulqa/truthfulqa_{metric}.yaml" for metric in ("mc1", "mc2")],
        "mmlu_stem": [f"mmlu/default/mmlu_{subject}.yaml" for subject in hub.configs],
    }


BUILTIN = _list_builtin()


def task_config(
    name: str,
    *,
    protocol: str = "default",
    num_fewshot: int | None = None,
    data_dir: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Configure the evaluation of a named data set.

    Where lm-eval has a task, it is that task, with records from the catalogue. GSM8K also gets the
    strict extraction that the other word problems have, beside lm-eval's own two, their metric
    `answered`, and their single beam without repetition penalty. BoolQ without
    passages is asked closed-book.

    Args:
        name: One of `TASKS`.
        protocol: How the model is asked and judged.
        num_fewshot: Worked examples in the prompt; `None` takes the task's own number, 5 for GSM8K
            and 0 for all others. Pass it here, not to `simple_evaluate`: without examples, no
            training records are read.
        data_dir: Local folder of data sets, as for `load_split`.

    Returns:
        One or more configurations: TruthfulQA is two tasks, MMLU one per subject.

    Raises:
        ValueError: If there is no such task or protocol, or no examples to show.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"`protocol` must be one of {', '.join(PROTOCOLS)}, got {protocol!r}.")
    if name not in TASKS[protocol]:
        raise ValueError(
            f"`{name}` is not a task of the protocol {protocol}{suggest(name, TASKS[protocol])}"
        )
    configs = []
    for path in _find_files(name, protocol, data_dir):
        config = load_yaml(path)
        if path.is_relative_to(THEIRS):
            config |= _take_over(config, name)
        if protocol == "default":
            config |= _choose_splits(config, num_fewshot)
        elif num_fewshot:
            raise ValueError(
                f"`num_fewshot` must be 0 for the protocol {protocol}, got {num_fewshot}."
            )
        config["dataset_kwargs"]["data_dir"] = None if data_dir is None else str(data_dir)
        configs.append(config)
    return configs


def records_config(
    records: str | Path | Sequence[Mapping[str, Any]],
    *,
    metric: Metric,
    name: str = "records",
    max_new_tokens: int = 128,
) -> list[dict[str, Any]]:
    """Configure the evaluation of the user's own records.

    Args:
        records: A file that `load_records` reads, or the records: `prompt` as text (what
            `load_evaluation_records` makes of messages and instructions) and `answer`; for
            `choices`, `answer` is the index into `choices`, texts that continue the prompt with
            their leading space; for `loss`, `completion` and the tokens that
            `load_evaluation_records` gives.
        metric: `exact_match` generates and judges as `answers.is_correct` does. `choices` compares
            likelihoods: `acc` by sums, `acc_norm` per character, `acc_bytes` per byte, which heads
            a table, and `nll` of the right choice, in nats per token, where tokens are given.
            `loss`: `nll` of the completion, in nats per token.
        name: Name of the task in the results.
        max_new_tokens: Longest response, in tokens.

    Returns:
        One configuration.

    Raises:
        ValueError: If a record lacks a field.
        RuntimeError: If an answer is a formula, and math-verify is not installed.
    """
    source = None
    if isinstance(records, str | Path):
        source = Path(records).name
        records = load_records(str(records), split="test")
    rows = [_check_record(record, number, metric) for number, record in enumerate(records, 1)]
    if not rows:
        raise ValueError("`records` must hold at least one record, got none.")
    if metric == "exact_match" and any(needs_math_verify(row["answer"]) for row in rows):
        check_math_verify()  # before anything is generated

    def read_rows(**_: Any) -> dict[str, Dataset]:
        return {"test": Dataset.from_list(rows)}

    config = load_yaml(OURS / "records" / f"{metric}.yaml")
    config |= {"task": name, "custom_dataset": read_rows}
    config["metadata"]["source"] = source
    if metric == "exact_match":
        config["generation_kwargs"]["max_gen_toks"] = max_new_tokens
    return [config]


def main_metric(config: Mapping[str, Any]) -> str:
    """Name the metric that heads a table.

    Args:
        config: A task's configuration, of `task_config` or under `configs` in lm-eval's results.

    Returns:
        lm-eval's name of metric and filter, such as `acc_norm,none` or `exact_match,strict`.
    """
    metrics = {entry["metric"] for entry in config["metric_list"]}
    headline = next(metric for metric in HEADLINES if metric in metrics)
    filters = config.get("filter_list")
    return f"{headline},{filters[0]['name'] if filters else 'none'}"


def _find_files(name: str, protocol: str, data_dir: str | Path | None) -> list[Path]:
    """Find a task's YAML: ours if there is one, else lm-eval's."""
    ours = OURS / protocol.replace("-", "_") / f"{name}.yaml"
    theirs = [THEIRS / path for path in BUILTIN.get(name, [])]
    if name == "boolq" and protocol == "default":
        records = load_split(name, data_dir=data_dir)
        return theirs if any(record["passage"] for record in records) else [ours]
    return [ours] if ours.is_file() else theirs


def _take_over(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Let one of lm-eval's own tasks read the catalogue's records."""
    own = load_yaml(OURS / "default" / "_number.yaml")
    evaluated = config.get("test_split") or config["validation_split"]
    validation = None if config.get("test_split") else evaluated
    shown = config.get("fewshot_split") or config.get("training_split")
    known = describe(name).splits
    kwargs: dict[str, Any] = {"name": name, "splits": {evaluated: "test"}}
    if shown in known:
        kwargs["splits"][shown] = shown
    if name == "mmlu_stem":
        kwargs["subject"] = config["dataset_name"]
    changes = {
        "custom_dataset": own["custom_dataset"],
        "dataset_kwargs": kwargs,
        "validation_split": validation,
        # They would name a source that was not read.
        "dataset_path": None,
        "dataset_name": None,
    }
    if name == "gsm8k":
        changes["filter_list"] = own["filter_list"] + config["filter_list"]
        answered = [entry for entry in own["metric_list"] if entry["metric"] == "answered"]
        changes["metric_list"] = config["metric_list"] + answered
        pinned = {key: own["generation_kwargs"][key] for key in ("num_beams", "repetition_penalty")}
        changes["generation_kwargs"] = config["generation_kwargs"] | pinned
    return changes


def _choose_splits(config: Mapping[str, Any], num_fewshot: int | None) -> dict[str, Any]:
    """Keep the split of worked examples only if some are wanted."""
    fixed = config.get("num_fewshot")
    wanted = (fixed or 0) if num_fewshot is None else num_fewshot
    shown = config.get("fewshot_split") or config.get("training_split")
    kwargs = config["dataset_kwargs"]
    splits = dict(kwargs["splits"])
    if wanted and (fixed == 0 or shown not in splits):
        raise ValueError(
            f"`num_fewshot` must be 0 for {config['task']}, which has no worked examples, "
            f"got {wanted}."
        )
    changes: dict[str, Any] = {"num_fewshot": wanted}
    if not wanted:
        splits.pop(shown, None)
        changes |= {"training_split": None, "fewshot_split": None}
    return {**changes, "dataset_kwargs": {**kwargs, "splits": splits}}


def _check_record(record: Mapping[str, Any], number: int, metric: str) -> dict[str, Any]:
    """Take the fields that a metric needs."""
    prompt, answer, choices = (record.get(key) for key in ("prompt", "answer", "choices"))
    fits = isinstance(prompt, str)
    if metric == "choices":
        fits = fits and isinstance(choices, list) and answer in range(len(choices))
        row = {"prompt": prompt, "choices": choices, "answer": answer}
        needed = "`prompt` as text, `choices` (a list of texts) and `answer` (its index)"
    elif metric == "loss":
        fits = fits and bool(record.get("completion_ids")) and "prompt_ids" in record
        row = {"prompt": prompt, "completion": record.get("completion")}
        needed = "`prompt` as text, `completion` and the tokens of both"
    else:
        fits = fits and answer not in (None, "")
        row = {"prompt": prompt, "answer": str(answer)}
        needed = "`prompt` as text and `answer`"
    # Of a rendered record; lm-eval shows only its text.
    tokens = ("prompt_ids", "choice_ids", "completion_ids")
    row |= {key: record[key] for key in tokens if key in record}
    if not fits:
        fields = ", ".join(f"`{key}`" for key in record) or "no fields"
        raise ValueError(
            f"`records` needs {needed} for the metric {metric}, and record {number} has {fields}; "
            "`load_evaluation_records` makes prompts of messages and instructions."
        )
    return row
