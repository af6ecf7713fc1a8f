"""The measurements of a finished run, in its folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from depthmix.adapters.ledger import Ledger
from depthmix.depth.layer_choice import LayerChoice
from depthmix.evaluation.earlier import find_earlier
from depthmix.evaluation.reading import load_evaluation
from depthmix.evaluation.result import EvaluationResult
from depthmix.files.drafts import write_whole
from depthmix.files.runs import RESULTS_NAME
from depthmix.models.calibrating import Calibration
from depthmix.models.exits import AddedExits


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
    """Training records that were `given`, those `dropped` by `data.without`, and those `used`; with
    `preset="fast"` also those `held_out`."""

    before: EvaluationResult | None
    """Evaluation of the pretrained model."""

    after: EvaluationResult | None
    """Evaluation of the tuned model."""

    choice: LayerChoice | None
    """What the late layers were chosen by, where `late_layers` is `auto`."""

    added: AddedExits | None = None
    """Exits that `preset="fast"` has put on the run just now."""

    calibration: Calibration | None = None
    """How they draft, likewise."""

    num_devices: int = 1
    """Devices among which batches were divided; each took the configuration's batch."""

    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the packages that trained, and the commit of a checkout, as the run began."""


def save_result(result: TrainResult) -> Path:
    """Write the measurements beside the adapter.

    Args:
        result: What `train` returns.

    Returns:
        The written file, `results.json` in the run's folder.
    """
    evaluations = {
        name: evaluation.folder.relative_to(result.output_dir).as_posix()
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
    # The file says that the run is finished.
    return write_whole(result.output_dir / RESULTS_NAME, json.dumps(content, indent=2) + "\n")


def load_result(folder: Path) -> TrainResult:
    """Read the measurements of a finished run.

    Args:
        folder: The run's folder, as `train` left it.

    Returns:
        What `train` returned. Runs of earlier versions kept their evaluations in the same file.

    Raises:
        ValueError: If the file is damaged.
        OSError: If the folder holds no finished run.
    """
    path = folder / RESULTS_NAME
    content = _read_content(path)
    with _explaining(path):
        earlier = find_earlier(folder, content)
        return replace(
            _to_result(folder, content),
            before=earlier.get("before") or _read_place(folder, content.get("before")),
            after=earlier.get("after") or _read_place(folder, content.get("after")),
        )


def load_record(folder: Path) -> TrainResult:
    """Read what a finished run says of its training alone, without the items of its evaluations.

    Args:
        folder: The run's folder, as `train` left it.

    Returns:
        As `load_result`, with `None` for both evaluations, whether there are any or not.

    Raises:
        ValueError: If the file is damaged.
        OSError: If the folder holds no finished run.
    """
    path = folder / RESULTS_NAME
    content = _read_content(path)
    with _explaining(path):
        return _to_result(folder, content)


def _read_content(path: Path) -> dict[str, Any]:
    """Read the file that says that a run is finished."""
    folder = path.parent
    if not path.is_file():
        raise FileNotFoundError(
            f"`run` must be the folder of a finished run, and {folder} holds no {RESULTS_NAME}; "
            "finish the run with `resume=True`, or name another folder."
        )
    with _explaining(path):
        content = json.loads(path.read_text("utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}, not a run's measurements")
        is_evaluation = "metrics" not in content and "results" in content
    if is_evaluation:
        raise ValueError(
            f"`run` must be the folder of a finished run, and {folder} holds an evaluation; name "
            "the folder that `depthmix train` wrote, or set evaluations side by side by `depthmix "
            "compare`."
        )
    return content


@contextmanager
def _explaining(path: Path) -> Iterator[None]:
    """Name the file that is damaged."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise ValueError(f"Cannot read {path}: {type(error).__name__}, {error}.") from error


def _to_result(folder: Path, content: Mapping[str, Any]) -> TrainResult:
    """Take all but the evaluations from what the file holds."""
    choice = content.get("layer_choice")
    return TrainResult(
        output_dir=folder,
        metrics=content["metrics"],
        log_history=content["log_history"],
        ledger=Ledger(**content["ledger"]),
        data=content.get("data", {}),
        before=None,
        after=None,
        choice=None if choice is None else TypeAdapter(LayerChoice).validate_python(choice),
        num_devices=content.get("num_devices", 1),
        versions=content.get("versions", {}),
    )


def _read_place(folder: Path, place: str | None) -> EvaluationResult | None:
    """Read an evaluation at a place in the run; None if there was none."""
    return None if place is None else load_evaluation(folder / place)
