"""What a compared run cost, and how fast it generates, as its folder says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depthmix.comparison.scores import Comparison
from depthmix.files.json import read_object
from depthmix.files.runs import CALIBRATION_NAME, EXITS_NAME, RESULTS_NAME, RUN_CONFIG_NAME


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one run took."""

    seconds: float | None
    """Of training alone; `None` if unknown, as all of these."""

    memory: float | None
    """Most of it in training, GiB of the process or of its accelerator."""

    parameters: int | None
    """Trained."""

    speed_up: float | None
    """How many times as fast it generates by `--fast`, as calibration has measured it."""

    def __str__(self) -> str:
        """Say what is known, with commas between."""
        said = []
        if self.seconds is not None:
            said.append(f"{self.seconds / 60:.1f} min of training")
        if self.memory is not None:
            said.append(f"{self.memory:.1f} GiB")
        if self.parameters is not None:
            said.append(f"{self.parameters:,} trained parameters")
        if self.speed_up is not None:
            said.append(f"generates {self.speed_up:.2f} times as fast by `--fast`")
        return ", ".join(said)


def read_cost(run: Path) -> Cost | None:
    """Read what a run took from its folder.

    Args:
        run: Its folder.

    Returns:
        The cost; `None` where nothing of it is known, as of a pretrained model.

    Raises:
        ValueError: If a file is damaged.
    """
    path = run / RESULTS_NAME
    if not path.is_file() or not (run / RUN_CONFIG_NAME).is_file():
        return None
    results = read_object(path, way_out="copy the run again, or train it again")
    log: list[Mapping[str, Any]] = results.get("log_history") or []
    memory = [entry["memory_gib"] for entry in log if entry.get("memory_gib")]
    calibration = run / EXITS_NAME / CALIBRATION_NAME
    measured: Mapping[str, Any] = {}
    if calibration.is_file():
        way_out = "calibrate again by `depthmix calibrate`"
        measured = read_object(calibration, way_out=way_out).get("measured") or {}
    cost = Cost(
        seconds=(results.get("metrics") or {}).get("train_runtime"),
        memory=max(memory, default=None),
        parameters=(results.get("ledger") or {}).get("total"),
        speed_up=measured.get("speed_up"),
    )
    return cost if str(cost) else None


def say_costs(comparison: Comparison) -> tuple[str, ...]:
    """Say what the compared runs cost, a line for those of which it is known.

    Args:
        comparison: Of any runs; of a method with several seeds the first is taken.

    Returns:
        One line, or none.
    """
    known = [
        (method.label, cost)
        for method in comparison.methods
        if (cost := read_cost(find_run(method.folders[0]))) is not None
    ]
    if not known:
        return ()
    return (f"Cost: {'; '.join(f'{label} {cost}' for label, cost in known)}.",)


def find_run(evaluation: Path) -> Path:
    """Find the folder of the run that an evaluation is of.

    Args:
        evaluation: Folder of the evaluation, such as `RUN/evaluation/training`.

    Returns:
        The run's folder, or of another model's evaluations.
    """
    is_run = (evaluation / RUN_CONFIG_NAME).is_file()
    return evaluation if is_run else evaluation.absolute().parents[1]
