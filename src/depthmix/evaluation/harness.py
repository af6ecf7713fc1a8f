"""Benchmarks by lm-eval: named data sets and own records, on any model and at any depth."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from depthmix.depth.readout import reading_out
from depthmix.evaluation.agenda import OWN_RECORDS, describe_data, prepare_tasks
from depthmix.evaluation.conversations import MTBenchSpec
from depthmix.evaluation.folder import EvaluationFolder
from depthmix.evaluation.mt_bench import evaluate_mt_bench
from depthmix.evaluation.names import JUDGED_METRICS
from depthmix.evaluation.plan import EvaluationPlan
from depthmix.evaluation.provenance import describe_model
from depthmix.evaluation.tasks import main_metric
from depthmix.evaluation.truthfulqa import evaluate_truthfulqa
from depthmix.extras import require
from depthmix.files.drafts import taking_room
from depthmix.method.placement import to_accelerator
from depthmix.models.loading import load_model, load_tokenizer
from depthmix.models.sources import find_base, find_models
from depthmix.models.spec import ModelSpec, to_spec
from depthmix.statistics.intervals import mean_interval
from depthmix.versions import list_versions

POOLED = ("mmlu_stem",)
"""Data sets whose tasks are parts of one test, counted together."""

REPORTED_PACKAGES = ("depthmix", "lm-eval", "torch", "transformers", "peft")
"""Packages whose versions stand in the results."""

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
    configs = dict(prepare_tasks(plan, spec))
    settings = describe_model(spec)
    settings |= {name: getattr(plan, name) for name in SETTINGS}
    settings["evaluation_seed"] = plan.seed
    data = {name: describe_data(name, plan, spec) for name in configs}
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
                outcome = score(loaded, tokenizer, configs[name], plan=plan, cache=folder.cache)
                metrics = {task: main_metric(config) for task, config in outcome["configs"].items()}
            if name in POOLED:
                outcome["group_subtasks"] = {name: list(outcome["configs"])}
            highest = 10.0 if name == "mt_bench" else 1.0
            facts = {
                "data": {name: data[name]},
                "main_metric": metrics,
                "highest_score": {} if highest == 1 else {name: highest},
                "intervals": {
                    task: find_intervals(samples, highest=highest)
                    for task, samples in outcome["samples"].items()
                },
                "packages": versions,
                "seconds": time.monotonic() - started,
            }
            folder.add(name, outcome, facts)
    return folder.results


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
            if isinstance(value, int | float) and 0 <= value <= highest:
                scores.setdefault(f"{metric},{sample['filter']}", []).append(value / highest)
    intervals = {key: mean_interval(np.array(values)) for key, values in scores.items()}
    return {key: [one.low * highest, one.high * highest] for key, one in intervals.items()}


def score(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[dict[str, Any]],
    *,
    plan: EvaluationPlan,
    cache: str | None = None,
) -> dict[str, Any]:
    """Run lm-eval's harness on a model in memory.

    Args:
        model: Decoder in evaluation mode, on the device where it is to run.
        tokenizer: Its tokenizer.
        tasks: Configurations of tasks, as `depthmix.evaluation.tasks` makes them.
        plan: Limit, number of examples, batch size and seed.
        cache: Beginning of the path of the file in which every answered request is kept; `None`
            keeps none.

    Returns:
        What `lm_eval.evaluate` returns, with samples.

    Raises:
        RuntimeError: If lm-eval is not installed.
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
    set_seed(plan.seed)
    loaded = TaskManager(include_defaults=False).load(list(tasks))
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=plan.seed)
    # In a dict, since lm-eval's annotations are narrower than what it takes.
    options: dict[str, Any] = {"pretrained": model, "tokenizer": tokenizer}
    prompts, continuations = _find_rendered(loaded["tasks"].values())
    language_model: Any = HarnessModel(
        **options,
        prompts=prompts,
        continuations=continuations,
        batch_size=plan.batch_size,
        softmax_dtype="float32",
    )
    if cache is not None:
        language_model = CachingLM(language_model, f"{cache}.db")
    # Not `simple_evaluate`, which runs pip and git for each call; intervals are made from samples.
    outcome = lm_eval.evaluate(language_model, loaded, limit=plan.limit, bootstrap_iters=0)
    assert outcome is not None  # only other ranks get nothing
    return dict(outcome)


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
        top_k: Routes that a mixture keeps per token; `None` keeps what it was trained with.
        output: Folder of results, with a folder inside for each of several models; `None` takes
            each model's `default_output`.
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


def _find_rendered(
    tasks: Iterable[Any],
) -> tuple[dict[str, list[int]], dict[tuple[str, str], list[int]]]:
    """Take the tokens of own records: those of prompts, and of choices after their prompts."""
    docs = [doc for task in tasks for doc in task.eval_docs if "prompt_ids" in doc]
    continuations = {
        (doc["prompt"], text): ids
        for doc in docs
        for text, ids in zip(doc.get("choices", []), doc.get("choice_ids", []), strict=True)
    }
    return {doc["prompt"]: doc["prompt_ids"] for doc in docs}, continuations


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
