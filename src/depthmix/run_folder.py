"""The folder of a run: what it may replace, and the measurements that it keeps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from transformers.trainer_utils import get_last_checkpoint

from depthmix.evaluation.scoring import Evaluation
from depthmix.layer_choice import LayerChoice
from depthmix.ledger import Ledger
from depthmix.run_config import (
    RESULTS_NAME,
    RUN_CONFIG_NAME,
    RunConfig,
    read_run_settings,
    to_settings,
)

FREE_PREFIXES = (
    *("data.eval", "training.eval", "training.metric_for_", "training.greater_is_better"),
    *("training.output_dir", "training.run_name", "training.save_", "training.load_best_"),
    *("training.push_to_hub", "training.hub_", "training.report_to", "training.log"),
    *("training.disable_tqdm", "training.resume_from_checkpoint", "training.dataloader_"),
    # How a batch is divided, among devices too, and what that costs.
    *("training.per_device_", "training.gradient_accumulation_", "training.gradient_checkpointing"),
    *("training.torch_compile", "training.fsdp", "training.deepspeed", "training.ddp_"),
)
"""How the names of settings begin that do not change what is trained."""


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    output_dir: Path
    """Folder of the adapter, the tokenizer, the configuration and the results."""

    metrics: dict[str, float]
    """Trainer's summary of the run; `eval_loss` in nats per label token where there is a data set
    for it, and `total_seconds` of wall time for everything."""

    log_history: list[dict[str, Any]]
    """What was logged, step by step."""

    ledger: Ledger
    """Trainable parameters by part."""

    data: dict[str, int]
    """Training records that were `given`, those `dropped` by `data.without`, and those `used`."""

    before: Evaluation | None
    """Evaluation of the pretrained model."""

    after: Evaluation | None
    """Evaluation of the tuned model."""

    choice: LayerChoice | None
    """What the late layers were chosen by, where `late_layers` is `auto`."""

    num_devices: int = 1
    """Devices among which batches were divided; each took the configuration's batch."""

    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the packages that trained, and the commit of a checkout, as the run began."""


def find_checkpoint(output_dir: Path, *, overwrite: bool, resume: bool) -> str | None:
    """Decide what becomes of a run that the output folder holds already.

    Args:
        output_dir: The folder.
        overwrite: Whether an earlier run may be replaced.
        resume: Whether it is to go on.

    Returns:
        The checkpoint to go on from; `None` to begin.

    Raises:
        ValueError: If both flags are set, or there is no checkpoint to go on from.
        FileExistsError: If the folder holds files that may not be replaced.
    """
    if overwrite and resume:
        raise ValueError("`overwrite` and `resume` exclude each other; choose one.")
    checkpoint = get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
    if resume:
        if checkpoint is None:
            raise ValueError(
                f"`resume` needs a checkpoint, and {output_dir} holds none; start the run without "
                "it, and set `training.save_steps` to have some."
            )
        return checkpoint
    holds_files = output_dir.exists() and any(output_dir.iterdir())
    if overwrite and holds_files and not (output_dir / RUN_CONFIG_NAME).is_file():
        raise FileExistsError(
            f"`overwrite` only replaces an earlier run, and {output_dir} holds other files; choose "
            "another `training.output_dir`, or empty it yourself."
        )
    if not overwrite and holds_files:
        raise FileExistsError(
            f"`training.output_dir` must be a new folder, and {output_dir} already holds files; "
            "pass `--resume` to go on, `--overwrite` to start again, or choose another folder."
        )
    return None


def check_resumed(config: RunConfig, output_dir: Path) -> None:
    """Refuse to go on with a run under other settings than those it began with.

    What is only logged, saved or evaluated may change, and how a batch is divided.

    Args:
        config: The settings it is to go on with.
        output_dir: Folder of the run.

    Raises:
        ValueError: If a setting differs that the first part of the training had otherwise.
    """
    path = output_dir / RUN_CONFIG_NAME
    if not path.is_file():
        return
    began, now = (
        dict(_list_settings(settings))
        for settings in (read_run_settings(path), to_settings(config))
    )
    for name in {**began, **now}:
        if began.get(name) != now.get(name):
            raise ValueError(
                f"`{name}` must be {began.get(name)!r} to go on with the run in {output_dir}, "
                f"which began with it, got {now.get(name)!r}; leave it so, or start the other run "
                "in a folder of its own."
            )


def _list_settings(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Name the settings that determine a training."""
    yield "method", settings.get("method")
    for section in ("model", "data", "mode", "training"):
        for option, value in settings.get(section, {}).items():
            name = f"{section}.{option}"
            if not name.startswith(FREE_PREFIXES):
                yield name, sorted(value) if option == "without" else value


@contextmanager
def removed_if_refused(directory: Path) -> Iterator[None]:
    """Leave no empty folder behind when the run is refused before it begins."""
    existed = directory.exists()
    try:
        yield
    except Exception:
        if not existed and directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()
        raise


def save_result(result: TrainResult) -> Path:
    """Write the measurements beside the adapter.

    Args:
        result: What `train` returns.

    Returns:
        The written file, `results.json` in the run's folder.
    """
    evaluations = {
        name: {
            "metric": evaluation.metric,
            "accuracy": evaluation.accuracy,
            "interval": asdict(evaluation.interval),
            "measures": dict(evaluation.measures),
            "correct": evaluation.correct,
            "responses": evaluation.responses,
        }
        for name, evaluation in (("before", result.before), ("after", result.after))
        if evaluation is not None
    }
    content = {
        "metrics": result.metrics,
        "data": result.data,
        "num_devices": result.num_devices,
        **evaluations,
        **({} if result.choice is None else {"layer_choice": asdict(result.choice)}),
        "ledger": asdict(result.ledger),
        "log_history": result.log_history,
        "versions": dict(result.versions),
    }
    path = result.output_dir / RESULTS_NAME
    draft = path.with_suffix(".tmp")  # the file says that the run is finished, so it must be whole
    draft.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    draft.replace(path)
    return path


def load_result(folder: Path) -> TrainResult:
    """Read the measurements of a finished run.

    Args:
        folder: The run's folder, as `train` left it.

    Returns:
        What `train` returned. Runs of earlier versions kept no responses: those are empty then.

    Raises:
        ValueError: If the file is damaged.
        OSError: If the folder holds no finished run.
    """
    path = folder / RESULTS_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"`run` must be the folder of a finished run, and {folder} holds no {RESULTS_NAME}; "
            "finish the run with `depthmix train … --resume`, or name another folder."
        )
    try:
        content = json.loads(path.read_text("utf-8"))
        choice = content.get("layer_choice")
        return TrainResult(
            output_dir=folder,
            metrics=content["metrics"],
            log_history=content["log_history"],
            ledger=Ledger(**content["ledger"]),
            data=content.get("data", {}),
            before=_to_evaluation(content.get("before")),
            after=_to_evaluation(content.get("after")),
            choice=None if choice is None else TypeAdapter(LayerChoice).validate_python(choice),
            num_devices=content.get("num_devices", 1),
            versions=content.get("versions", {}),
        )
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise ValueError(f"Cannot read {path}: {type(error).__name__}, {error}.") from error


def _to_evaluation(content: Mapping[str, Any] | None) -> Evaluation | None:
    """Read one evaluation; accuracy and interval follow from its items."""
    if content is None:
        return None
    correct = tuple(map(bool, content["correct"]))
    return Evaluation(
        metric=content["metric"],
        correct=correct,
        responses=tuple(content.get("responses", ("",) * len(correct))),
        measures=content.get("measures", {}),
    )
