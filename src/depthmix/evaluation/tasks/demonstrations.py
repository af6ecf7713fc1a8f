"""Training records in the text in which their benchmark asks and answers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.tasks import TaskManager

from depthmix.data.catalog import CATALOG, describe
from depthmix.data.instructions import INSTRUCTIONS, conclude
from depthmix.data.records import is_named
from depthmix.data.schemas import AQUA_PROMPT, LETTERS
from depthmix.evaluation.tasks.configs import TASKS, task_config

Record = Mapping[str, Any]

MIXTURES = ("math7k", "math_10k")
"""Forms of data sets that mix word problems of several benchmarks, as instructions."""


def check_benchmark(source: str, option: str) -> None:
    """Check that records can be written as a benchmark asks and answers.

    Args:
        source: Where they come from, as `load_records` takes it.
        option: Name of the option that holds it, for the message.

    Raises:
        ValueError: If it is no named data set, or one without a benchmark.
    """
    names = [name for name in CATALOG if _has_benchmark(name)]
    if not is_named(source) or source not in names:
        raise ValueError(
            f'`{option}` must be a named data set with a benchmark for the template "lm-eval" '
            f"({', '.join(names)}), and {source} is none; choose another `data.template`."
        )


def to_demonstrations(
    records: Sequence[Record], name: str, *, data_dir: str | Path | None = None
) -> list[dict[str, str]]:
    """Write training records as the protocol `default` asks, without worked examples, and answers.

    Multiple choice is answered by lm-eval's own request for the right choice: the tokens of prompt
    and completion are those that it scores. Word problems are answered by their rationale, at whose
    end stands "The answer is …."; those of a mixture are asked as GSM8K's, or with options as
    AQuA's.

    Args:
        records: Of the named data set, from `load_published`.
        name: Name of the data set.
        data_dir: Local folder of data sets, as for `load_split`.

    Returns:
        `prompt` and `completion`, which begins with the space that parts them.

    Raises:
        ValueError: If the data set has no benchmark.
    """
    check_benchmark(name, "name")
    form = describe(name).form
    asked = [_find_problem(record) if form in MIXTURES else (name, record) for record in records]
    tasks = {
        task: _build_task(task, [doc for other, doc in asked if other == task], data_dir)
        for task in {task for task, _ in asked}
    }
    docs = {task: iter(built.eval_docs) for task, built in tasks.items()}
    return [
        _demonstrate(tasks[task], next(docs[task]), _answer(record, form))
        for (task, _), record in zip(asked, records, strict=True)
    ]


def _has_benchmark(name: str) -> bool:
    """Tell whether a data set can be trained on as it is asked."""
    data_set = CATALOG[name]
    return data_set.trainable and (name in TASKS["default"] or data_set.form in MIXTURES)


def _find_problem(record: Record) -> tuple[str, dict[str, Any]]:
    """Say as which task's problem an instruction is asked, and give that problem."""
    problem = {"question": record["instruction"], "answer": record["answer"]}
    found = AQUA_PROMPT.fullmatch(record["instruction"])
    if found is None:
        return "gsm8k", problem
    options = [found[letter] for letter in LETTERS]
    return "aqua", problem | {"question": found["question"], "options": options}


def _build_task(name: str, docs: Sequence[Record], data_dir: str | Path | None) -> Any:
    """Build lm-eval's task, with the given records in the place of its test split."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of our records
    (config,) = task_config(name, num_fewshot=0, data_dir=data_dir)
    evaluated = config.get("test_split") or config["validation_split"]

    def read_given(**_: Any) -> dict[str, Dataset]:
        return {evaluated: Dataset.from_list([dict(doc) for doc in docs])}

    tasks = TaskManager(include_defaults=False).load([config | {"custom_dataset": read_given}])
    return tasks["tasks"][config["task"]]


def _answer(record: Record, form: str) -> str:
    """Give a record's answer in words, with its rationale where it has one."""
    output = INSTRUCTIONS[form](record)["output"]
    if form != "math_10k":
        return output
    # LLM-Adapters' rationales end as it came.
    return conclude(output.strip(), record["answer"].removesuffix(".0"))


def _demonstrate(task: Any, doc: Record, answer: str) -> dict[str, str]:
    """Write one record as the task asks it; a choice is answered by the task's own request."""
    prompt = task.fewshot_context(doc=doc, num_fewshot=0)
    if task.OUTPUT_TYPE == "multiple_choice":
        requests = task.construct_requests(doc=doc, ctx=prompt)
        prompt, completion = requests[task.doc_to_target(doc)].args
    else:
        completion = f"{task.config.target_delimiter}{answer}"
    return {"prompt": prompt, "completion": completion}
