"""What runs of earlier versions measured in training, which kept it in their `results.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from depthmix.evaluation.identity import UNTUNED, describe_tuning
from depthmix.evaluation.result import EvaluationResult, TaskResult
from depthmix.files.runs import RESULTS_NAME, RUN_CONFIG_NAME, read_run_settings

PROTOCOL = "depthmix train"
"""Stands for how earlier versions asked and judged in training."""


def read_earlier(run: Path) -> dict[str, EvaluationResult]:
    """Read what a run of an earlier version measured before and after training.

    Args:
        run: Its folder, of which `results.json` alone may be left.

    Returns:
        `before` and `after`, as far as they were measured; nothing for other runs. Items are known
        by their place in the data, and so are compared only with those of other such runs. Their
        texts were not kept.

    Raises:
        ValueError: If a file is damaged.
        OSError: If the adapter of the run is gone.
    """
    if not (run / RESULTS_NAME).is_file():
        return {}
    try:
        results = json.loads((run / RESULTS_NAME).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"Cannot read {run / RESULTS_NAME}: {error}.") from error
    return find_earlier(run, results)


def find_earlier(run: Path, results: Any) -> dict[str, EvaluationResult]:
    """Find in what a `results.json` holds what a run of an earlier version measured.

    Args:
        run: The folder of the file.
        results: What it holds.

    Returns:
        As `read_earlier`.

    Raises:
        ValueError: If a file is damaged.
        OSError: If the adapter of the run is gone.
    """
    measured = {
        moment: results[moment]
        for moment in ("before", "after")
        if isinstance(results, Mapping) and isinstance(results.get(moment), Mapping)
    }
    if not measured:
        return {}
    path = run / RUN_CONFIG_NAME
    settings = read_run_settings(path) if path.is_file() else {}
    facts: dict[str, Any] = {"method": run.name, "seed": 0, "settings": None}
    if settings:
        facts |= describe_tuning(run, settings)
    untuned = {"method": UNTUNED, "seed": 0, "settings": None, "adapter_sha256": None}
    try:
        return {
            moment: _to_result(
                run, content, settings, facts | (untuned if moment == "before" else {})
            )
            for moment, content in measured.items()
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"Cannot read {run / RESULTS_NAME}: {type(error).__name__}, {error}."
        ) from error


def _to_result(
    run: Path, content: Mapping[str, Any], settings: Mapping[str, Any], facts: Mapping[str, Any]
) -> EvaluationResult:
    """Write one of the two in the form of an evaluation."""
    model, asked = settings.get("model", {}), settings.get("evaluation") or {}
    source = asked.get("data", "records")
    name = Path(source).stem
    data = {"source": source, "template": settings.get("data", {}).get("template", "auto")}
    if content["metric"] == "exact_match":
        data["max_new_tokens"] = str(asked.get("max_new_tokens"))
    scores = {
        (name, f"{place:08d}", 0): float(bool(correct))
        for place, correct in enumerate(content["correct"])
    }
    return EvaluationResult(
        folder=run,
        method=facts["method"],
        model=str(model.get("name", "")),
        protocol=PROTOCOL,
        layer="ensemble",
        seed=facts["seed"],
        settings=facts["settings"],
        adapter=facts.get("adapter_sha256"),
        dtype=model.get("dtype"),
        top_k=None,
        tasks={
            name: TaskResult(
                metric=content["metric"],
                scores=scores,
                data=data,
                measures=dict(content.get("measures", {})),
            )
        },
    )
