"""Benchmarks by lm-eval: named data sets and own records, on any model and at any depth."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from depthmix.adapters.readout import reading_out
from depthmix.evaluation.agenda import prepare_tasks
from depthmix.evaluation.conversations import MTBenchSpec
from depthmix.evaluation.folder import EvaluationFolder
from depthmix.evaluation.mt_bench import evaluate_mt_bench
from depthmix.evaluation.names import JUDGED_METRICS
from depthmix.evaluation.own_records import OWN_RECORDS
from depthmix.evaluation.plan import EvaluationPlan
from depthmix.evaluation.provenance import describe_model
from depthmix.evaluation.scoring import REPORTED_PACKAGES, keep, score
from depthmix.evaluation.tasks import main_metric
from depthmix.evaluation.truthfulqa import evaluate_truthfulqa
from depthmix.files.drafts import taking_room
from depthmix.files.versions import list_versions
from depthmix.method.placement import to_accelerator
from depthmix.models.loading import load_model, load_tokenizer
from depthmix.models.sources import find_base, find_models
from depthmix.models.spec import ModelSpec, to_spec

POOLED = ("mmlu_stem",)
"""Data sets whose tasks are parts of one test, counted together."""

SETTINGS = ("protocol", "layer", "limit", "num_fewshot")
"""Fields of a plan that determine every result."""


def evaluate(
    model: str | Path | ModelSpec,
    plan: EvaluationPlan | None = None,
    *,
    output_dir: Path | str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Measure a model on benchmarks: `evaluate("runs/arc", tasks=["arc_easy"], limit=100)`.

    Results and samples are kept in a folder.

    An interrupted evaluation goes on where it stopped when it is started again; what is finished is
    not run again. The results do not depend on where it was interrupted.

    Args:
        model: A model as `load_model` takes it: a name, such as the folder of a run, or a spec.
        plan: What to measure, unless its fields are given one by one.
        output_dir: Folder of results; `None` takes `default_output`.
        overwrite: Begin anew where the folder holds an evaluation with other settings.
        options: Fields of `EvaluationPlan`, instead of `plan`.

    Returns:
        lm-eval's results without the samples, and under `depthmix` what was measured: model,
        method, protocol, layer, seed, and for each task its data and its main metric.

    Raises:
        ValueError: If a task, an option or the layer does not fit.
        OSError: If the model or data cannot be found, or the folder is full.
        FileExistsError: If the folder holds something else.
        MissingExtraError: If lm-eval is not installed.
        TypeError: If both a plan and options are given.
    """
    spec = to_spec(model)
    if plan is not None and options:
        raise TypeError(
            f"`plan` and the options {', '.join(options)} cannot both be given; put the options "
            "into `EvaluationPlan`."
        )
    plan = plan or EvaluationPlan(**options)
    versions = list_versions(REPORTED_PACKAGES)
    prepared = list(prepare_tasks(plan, spec))
    configs = {name: configs for name, configs, _ in prepared}
    data = {name: facts for name, _, facts in prepared}
    settings = describe_model(spec)
    settings |= {name: getattr(plan, name) for name in SETTINGS}
    settings["evaluation_seed"] = plan.seed
    folder = EvaluationFolder(
        Path(output_dir or default_output(spec, plan)), settings, overwrite=overwrite
    )
    if OWN_RECORDS in data:
        facts = data.pop(OWN_RECORDS)
        own = folder.find_name(OWN_RECORDS, facts)
        data[own] = facts
        configs[own] = [{**config, "task": own} for config in configs.pop(OWN_RECORDS)]
    missing = [name for name in data if not folder.is_finished(name, data[name])]
    if not missing:
        return folder.results
    tokenizer, loaded = load_tokenizer(spec), load_model(spec)
    loaded = to_accelerator(loaded).eval()
    with (
        reading_out(loaded, plan.layer),
        taking_room(folder.path, "output", then="start it again to go on"),
    ):
        folder.begin()
        for number, name in enumerate(missing, start=1):
            print(f"{name} ({number} of {len(missing)})", file=sys.stderr)
            started = time.monotonic()
            if name in JUDGED_METRICS:
                outcome = _judge(name, loaded, tokenizer, plan, folder.path)
                metrics = {name: JUDGED_METRICS[name]}
            else:
                set_seed(plan.seed)
                outcome = score(
                    loaded,
                    tokenizer,
                    configs[name],
                    batch_size=plan.batch_size,
                    limit=plan.limit,
                    fewshot_seed=plan.seed,
                    cache=folder.cache,
                )
                metrics = {task: main_metric(config) for task, config in outcome["configs"].items()}
            if name in POOLED:
                outcome["group_subtasks"] = {name: list(outcome["configs"])}
            keep(
                folder,
                name,
                outcome,
                data=data[name],
                metrics=metrics,
                versions=versions,
                seconds=time.monotonic() - started,
                highest=10.0 if name == "mt_bench" else 1.0,
            )
    return folder.results


def evaluate_all(
    names: Sequence[str],
    plan: EvaluationPlan,
    *,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    top_k: int | None = None,
    output: Path | None = None,
    overwrite: bool = False,
) -> Iterator[Path]:
    """Measure several models one after the other.

    Args:
        names: Models as `model.name` takes them, runs, or folders of runs.
        plan: What to measure.
        dtype: Type of the weights in memory.
        top_k: Layers of a mixture that vote per token, fewer than it was trained with.
        output: Folder of results, one folder inside for each of several models; by default
            `evaluation/` in a run, or `evaluations/` here for other models.
        overwrite: Begin anew where a folder holds an evaluation with other settings.

    Yields:
        The folder of each evaluation, as soon as it is finished.

    Raises:
        ValueError: As `evaluate`, and if two models would share a folder.
    """
    named = [ModelSpec(name=name, dtype=dtype, top_k=top_k) for name in names]
    specs = [found for spec in named for found in find_models(spec)]
    folders = [default_output(spec, plan) for spec in specs]
    if output is not None:
        inner = [output / Path(spec.name).expanduser().resolve().name for spec in specs]
        folders = inner if len(specs) > 1 else [output]
    if len(set(folders)) < len(folders):
        raise ValueError(
            "`models` must have different names, since each has its folder of results, got "
            f"{', '.join(spec.name for spec in specs)}; evaluate them one by one with "
            "`output`."
        )
    for spec, folder in zip(specs, folders, strict=True):
        evaluate(spec, plan, output_dir=folder, overwrite=overwrite)
        yield folder


def default_output(spec: ModelSpec, plan: EvaluationPlan) -> Path:
    """Name the folder of an evaluation: inside a run, or below `evaluations` for other models.

    Args:
        spec: The model.
        plan: What to measure.

    Returns:
        `RUN/evaluation/PROTOCOL`, with the layer where it is not the ensemble that answers, and
        with Top-K where it is set.
    """
    name = plan.protocol if plan.layer == "ensemble" else f"{plan.protocol}-layer-{plan.layer}"
    name += "" if spec.top_k is None else f"-top-{spec.top_k}"
    adapter = find_base(spec).adapter
    if adapter is not None:
        return Path(adapter).expanduser() / "evaluation" / name
    on_hub = not Path(spec.name).expanduser().exists()
    model = spec.name.replace("/", "--") if on_hub else Path(spec.name).resolve().name
    return Path("evaluations") / model / name


def _judge(
    name: str,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: EvaluationPlan,
    folder: Path,
) -> dict[str, Any]:
    """Run a judged benchmark."""
    assert plan.judge is not None  # the plan has checked it
    options: dict[str, Any] = {
        "judge": plan.judge,
        "output_dir": folder,
        "data_dir": Path(plan.data_dir) if plan.data_dir else None,
        "limit": plan.limit,
        "seed": plan.seed,
    }
    if name == "mt_bench":
        conversations = plan.mt_bench or MTBenchSpec(batch_size=plan.batch_size)
        judged = evaluate_mt_bench(model, tokenizer, section=conversations, **options)
    else:
        judged = evaluate_truthfulqa(model, tokenizer, batch_size=plan.batch_size, **options)
    return judged.to_harness()
