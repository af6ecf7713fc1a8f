"""The benchmarks by name, without what it takes to run them."""

from __future__ import annotations

from pathlib import Path

PROTOCOLS = ("default", "llm-adapters")
"""How models are asked and judged."""

TASKS: dict[str, tuple[str, ...]] = {
    "default": (
        *("addsub", "aqua", "gsm8k", "mawps", "multiarith", "singleeq", "svamp"),
        *("arc_easy", "arc_challenge", "boolq", "openbookqa", "hellaswag", "truthfulqa"),
        "mmlu_stem",
    ),
    "llm-adapters": tuple(
        path.stem for path in sorted(Path(__file__).parent.glob("tasks/llm_adapters/[!_]*.yaml"))
    ),
}
"""Names of tasks, by protocol."""

JUDGED_METRICS = {"mt_bench": "score,none", "truthfulqa_judged": "true_and_informative,none"}
"""Benchmarks whose answers a judge rates, and the metric that heads a table of each."""

DATA_SETS = {"truthfulqa_judged": "truthfulqa"}
"""Data sets of tasks that are not called after theirs."""
