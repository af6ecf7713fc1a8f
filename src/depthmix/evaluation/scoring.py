"""How good a model in memory is: lm-eval's tasks on it, and what is kept of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from depthmix.evaluation.folder import EvaluationFolder
from depthmix.evaluation.samples import LOSSES
from depthmix.libraries.extras import require
from depthmix.models.asking import prepared
from depthmix.statistics.intervals import mean_interval

REPORTED_PACKAGES = ("depthmix", "lm-eval", "torch", "transformers", "peft")
"""Packages whose versions stand in the results."""


def score(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[dict[str, Any]],
    *,
    batch_size: int,
    limit: int | None = None,
    fewshot_seed: int = 0,
    cache: str | None = None,
) -> dict[str, Any]:
    """Run lm-eval's harness on a model in memory.

    Args:
        model: Decoder on the device where it is to run; stays in the mode it is in.
        tokenizer: Its tokenizer; its padding stays as it is.
        tasks: Configurations of tasks, as `depthmix.evaluation.tasks` makes them.
        batch_size: Sequences that are run together.
        limit: Items per task, from the start; `None` takes all.
        fewshot_seed: Of the examples in prompts.
        cache: Beginning of the path of the file in which every answered request is kept; `None`
            keeps none.

    Returns:
        What `lm_eval.evaluate` returns, with samples.

    Raises:
        MissingExtraError: If lm-eval is not installed.
    """
    require("eval", "A benchmark", "lm_eval")
    import lm_eval
    from lm_eval.api.model import CachingLM
    from lm_eval.tasks import TaskManager

    from depthmix.evaluation.harness_model import HarnessModel

    # It warns of things that we do on purpose, once for every task.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # It shows where an error came from before the error itself comes.
    logging.getLogger("sqlitedict").setLevel(logging.CRITICAL + 1)
    loaded = TaskManager(include_defaults=False).load(list(tasks))
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=fewshot_seed)
    # In a dict, since lm-eval's annotations are narrower than what it takes.
    options: dict[str, Any] = {"pretrained": model, "tokenizer": tokenizer}
    prompts, continuations = _find_rendered(loaded["tasks"].values())
    with prepared(model, tokenizer):
        language_model: Any = HarnessModel(
            **options,
            prompts=prompts,
            continuations=continuations,
            batch_size=batch_size,
            softmax_dtype="float32",
        )
        if cache is not None:
            language_model = CachingLM(language_model, f"{cache}.db")
        # Not `simple_evaluate`, which runs pip and git for each call; intervals are made from
        # samples.
        outcome = lm_eval.evaluate(language_model, loaded, limit=limit, bootstrap_iters=0)
    assert outcome is not None  # only other ranks get nothing
    return dict(outcome)


def keep(
    folder: EvaluationFolder,
    name: str,
    outcome: Mapping[str, Any],
    *,
    data: Mapping[str, Any],
    metrics: Mapping[str, str],
    versions: Mapping[str, str],
    seconds: float,
    highest: float = 1.0,
) -> None:
    """Keep a finished task in its folder, with intervals and what the numbers depend on.

    Args:
        folder: Of the evaluation.
        name: The named set.
        outcome: What `score` returned for it.
        data: What the results depend on beside the model and the settings.
        metrics: The main metric of each of its tasks.
        versions: Of the packages that measured.
        seconds: Wall time of the task.
        highest: Highest score of an item.

    Raises:
        OSError: If the folder cannot be written.
    """
    facts = {
        "data": {name: data},
        "main_metric": metrics,
        "highest_score": {} if highest == 1 else {name: highest},
        "intervals": {
            task: find_intervals(samples, highest=highest)
            for task, samples in outcome["samples"].items()
        },
        "packages": versions,
        "seconds": seconds,
    }
    folder.add(name, outcome, facts)


def find_intervals(
    samples: Sequence[Mapping[str, Any]], *, highest: float = 1.0
) -> dict[str, list[float]]:
    """Compute a 95 % interval of every metric that is a mean over items.

    Args:
        samples: lm-eval's samples of one task.
        highest: Highest score of an item; the lowest is 0.

    Returns:
        Lower and upper end by lm-eval's name of metric and filter.
    """
    scores: dict[str, list[float]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            value = sample.get(metric)
            if isinstance(value, int | float) and (0 <= value <= highest or metric in LOSSES):
                scores.setdefault(f"{metric},{sample['filter']}", []).append(value)
    ends = {}
    for key, values in scores.items():
        if key.partition(",")[0] in LOSSES:
            interval, factor = mean_interval(np.array(values), are_losses=True), 1.0
        else:
            interval, factor = mean_interval(np.array(values) / highest), highest
        if math.isfinite(interval.low) and math.isfinite(interval.high):
            ends[key] = [interval.low * factor, interval.high * factor]
    return ends


def _find_rendered(
    tasks: Iterable[Any],
) -> tuple[dict[str, list[int]], dict[tuple[str, str], tuple[Sequence[int], Sequence[int]]]]:
    """Take the tokens of own records: those of prompts, and of what follows their prompts."""
    docs = [doc for task in tasks for doc in task.eval_docs if "prompt_ids" in doc]
    continuations = {
        (doc["prompt"], text): (doc["prompt_ids"], ids)
        for doc in docs
        for text, ids in zip(doc.get("choices", []), doc.get("choice_ids", []), strict=True)
    }
    continuations |= {
        (doc["prompt"], doc["completion"]): (doc["prompt_ids"], doc["completion_ids"])
        for doc in docs
        if "completion_ids" in doc
    }
    return {doc["prompt"]: doc["prompt_ids"] for doc in docs}, continuations
