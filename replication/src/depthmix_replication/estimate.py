"""About how long the missing runs of an experiment will take on this machine."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from depthmix.data.catalog import CATALOG
from depthmix.evaluation.names import DATA_SETS
from depthmix.files.runs import RESULTS_NAME
from depthmix_replication.problems import NUM_TRAINING
from depthmix_replication.runs import MADE, Reading, Run
from depthmix_replication.sizes import NUM_RECORDS, count_parameters
from depthmix_replication.workspace import Workspace, read_seconds

TOKENS_PER_RECORD = 100
"""Of a training record or a question with one of its answers, in the order of magnitude."""

SEQUENCES_PER_ITEM = 4
"""Choices of a question."""

RECORDS_UNKNOWN = 5000
"""Training records where the settings do not limit them, in the order of magnitude."""

PRODUCT_SIZE = 1024
PEAK_SHARE = 0.4
"""Share of a matrix product's speed that training reaches."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """About how long runs take, and what that rests on."""

    seconds: float
    """Wall time, one run after the other, in the order of magnitude."""

    guessed: tuple[str, ...]
    """Models of which no run is finished in the workspace: for these the speed of a matrix product
    on this machine's processor stands."""

    def __str__(self) -> str:
        """Say what it rests on."""
        if not self.guessed:
            return "by the finished runs of the same model here"
        names = ", ".join(self.guessed)
        return f"by the speed of a matrix product here, since no run of {names} is finished"


def estimate(
    workspace: Workspace, runs: Sequence[tuple[Run, tuple[Reading, ...]]]
) -> Estimate | None:
    """Estimate the time of runs, one after the other.

    From finished runs of the same model in the workspace, scaled by the number of operations;
    without any, from the speed of a matrix product on this machine's processor: with a GPU, much
    less is needed.

    Args:
        workspace: Where finished runs are.
        runs: Runs with the readings that are missing.

    Returns:
        The estimate; `None` if a model's configuration cannot be had.
    """
    seconds_per_operation: dict[str, float] = {}
    guessed: list[str] = []
    total = 0.0
    for run, readings in runs:
        name = run.settings["model"]["name"]
        left = () if workspace.is_trained(run) else (run,)
        try:
            if name not in seconds_per_operation:
                known = _measured(workspace, name)
                if known is None:
                    guessed.append(name)
                    known = 1 / (PEAK_SHARE * _operations_per_second())
                seconds_per_operation[name] = known
            needed = sum(count_training(one) for one in left)
            needed += sum(count_reading(run, reading) for reading in readings)
        except (OSError, ValueError):
            return None
        total += needed * seconds_per_operation[name]
    return Estimate(seconds=total, guessed=tuple(guessed))


def count_training(run: Run) -> float:
    """Count the floating-point operations of a run's training roughly: 6 N per token.

    Args:
        run: The run.

    Returns:
        Operations, in the order of magnitude.

    Raises:
        OSError: If the model's configuration cannot be had.
    """
    training = run.settings["training"]
    records = _count_records(run) * training.get("num_train_epochs", 3)
    if (steps := training.get("max_steps", -1)) > 0:
        batch = training.get("per_device_train_batch_size", 8)
        records = steps * batch * training.get("gradient_accumulation_steps", 1)
    return 6.0 * count_parameters(run.settings["model"]["name"]) * TOKENS_PER_RECORD * records


def count_reading(run: Run, reading: Reading) -> float:
    """Count the floating-point operations of an evaluation roughly: 2 N per token.

    Args:
        run: What is read.
        reading: How.

    Returns:
        Operations, in the order of magnitude.

    Raises:
        OSError: If the model's configuration cannot be had.
    """
    num_items = sum(_count_items(reading, task) for task in reading.tasks or (None,))
    num_examples = 1 + (reading.num_fewshot or 0)
    num_tokens = TOKENS_PER_RECORD * num_examples * SEQUENCES_PER_ITEM * num_items
    return 2.0 * count_parameters(run.settings["model"]["name"]) * num_tokens


def _count_records(run: Run) -> int:
    """Count the records that a run trains on, those with a test set's question among them."""
    data = run.settings["data"]
    limit, split = data.get("limit"), data.get("split", "train")
    if data["train"].startswith(f"{MADE}:"):
        return min(limit or NUM_TRAINING, NUM_TRAINING)
    known = _count_split(data["train"], split, whole=run.data_whole is not None)
    return limit or RECORDS_UNKNOWN if known is None else min(limit or known, known)


def _count_items(reading: Reading, task: str | None) -> int:
    """Count the items of a benchmark, for each of whose parts a limit holds; `None`: invented."""
    limit = reading.limit
    if task is None:
        return limit or NUM_RECORDS
    name = DATA_SETS.get(task, task)
    known = _count_split(name, "test", whole=reading.whole is not None)
    assert known is not None  # a reading names benchmarks, all of which the catalogue has
    hub = CATALOG[name].hub
    num_parts = len(hub.configs) if hub is not None else 1
    return known if limit is None else min(limit * num_parts, known)


def _count_split(name: str, split: str, *, whole: bool) -> int | None:
    """Count the records of a named data set's split, whole or in files; None for another."""
    data = CATALOG.get(name)
    part = None if data is None else data.splits.get(data.aliases.get(split, split))
    if part is None:
        return None
    return part.hub_records if whole and part.hub_records is not None else part.records


def _measured(workspace: Workspace, model: str) -> float | None:
    """Take seconds per operation from finished runs of the same model."""
    rates = []
    for path in (workspace.root / "runs").glob(f"*/{RESULTS_NAME}"):
        settings_file = path.parent / "settings.json"
        if not settings_file.is_file():
            continue
        run = Run(**json.loads(settings_file.read_text("utf-8")))
        if run.settings["model"]["name"] == model:
            rates.append(read_seconds(path.parent) / count_training(run))
    return median(rates) if rates else None


@functools.cache
def _operations_per_second() -> float:
    """Time a matrix product on the processor."""
    a = np.random.default_rng(0).random((PRODUCT_SIZE, PRODUCT_SIZE), dtype=np.float32)
    for repetition in range(2):  # the first one warms up
        started = time.perf_counter()
        a @ a
        if repetition:
            break
    return 2 * PRODUCT_SIZE**3 / (time.perf_counter() - started)
