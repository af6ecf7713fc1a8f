"""The folder that holds runs: each under the hash of its settings, so that none is made twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout
from pydantic_core import to_jsonable_python

from depthmix.files.drafts import write_whole
from depthmix.files.runs import RESULTS_NAME, RUN_CONFIG_NAME
from depthmix.files.settings import build_section
from depthmix.models.spec import ModelSpec
from depthmix_replication.runs import MADE, TOY, Reading, Run

if TYPE_CHECKING:
    from depthmix.evaluation.plan import EvaluationPlan

FINISHED_NAME = "finished.json"
"""Marks a reading that is complete."""

NOT_OF_A_PLAN = ("top_k", "speed", "judge", "whole")
"""What a reading says beside what `evaluate` takes, or in its own way."""

EARLIER_NAME = "earlier_starts.json"
"""Seconds that each earlier start of a resumed run took up to the checkpoint that it left."""


class Workspace:
    """Runs and their evaluations on disk; several processes and machines may share it.

    `runs/KEY/` is a run as `depthmix train` leaves it, with `evaluation/KEY/` for each reading and
    `speed-1-2-3.json` for generation timed under these values of Top-K by turns. A run belongs to
    the process that holds its lock, which the system gives back when that process ends, however it
    ends.

    Args:
        root: The folder; made if missing.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def run_folder(self, run: Run) -> Path:
        """Name the folder of a run."""
        return self.root / "runs" / run.key

    def reading_folder(self, run: Run, reading: Reading) -> Path:
        """Name the folder of an evaluation."""
        return self.run_folder(run) / "evaluation" / reading.key

    def speed_file(self, run: Run, reading: Reading) -> Path:
        """Name the file of a run's timed generation: one for all readings that time the same."""
        return self.run_folder(run) / f"speed-{'-'.join(map(str, reading.speed))}.json"

    def is_trained(self, run: Run) -> bool:
        """Tell whether a run's training is finished."""
        return run.untuned or (self.run_folder(run) / RESULTS_NAME).is_file()

    def is_read(self, run: Run, reading: Reading) -> bool:
        """Tell whether an evaluation is finished, and generation timed where that is asked for."""
        finished = (self.reading_folder(run, reading) / FINISHED_NAME).is_file()
        return finished and self.is_timed(run, reading)

    def is_timed(self, run: Run, reading: Reading) -> bool:
        """Tell whether nothing is left to time."""
        return not reading.speed or self.speed_file(run, reading).is_file()

    def missing(self, run: Run, readings: Sequence[Reading]) -> tuple[Reading, ...]:
        """List the readings of a run that are not finished."""
        return tuple(reading for reading in readings if not self.is_read(run, reading))

    def is_finished(self, run: Run, readings: Sequence[Reading]) -> bool:
        """Tell whether a run is trained and read in all ways."""
        return self.is_trained(run) and not self.missing(run, readings)

    def has_checkpoint(self, run: Run) -> bool:
        """Tell whether a run was interrupted after a checkpoint, from which it goes on."""
        from depthmix.training.trainers.checkpoints import (
            find_last_checkpoint,  # listing runs needs none
        )

        return find_last_checkpoint(self.run_folder(run)) is not None

    def clear(self, run: Run) -> None:
        """Remove an interrupted run that has no whole checkpoint to go on from."""
        folder = self.run_folder(run)
        if folder.is_dir() and not self.is_trained(run) and not self.has_checkpoint(run):
            shutil.rmtree(folder)

    def describe(self, run: Run) -> None:
        """Write a run's settings into its folder, for people."""
        folder = self.run_folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "settings.json", asdict(run))

    def note_earlier_start(self, run: Run) -> None:
        """Keep how long an interrupted training took, before it goes on from its checkpoint."""
        from transformers.trainer import TRAINER_STATE_NAME

        from depthmix.training.trainers.checkpoints import find_last_checkpoint

        folder = self.run_folder(run)
        checkpoint = find_last_checkpoint(folder)
        assert checkpoint is not None  # whoever calls this has asked `has_checkpoint`
        began = (folder / RUN_CONFIG_NAME).stat().st_mtime
        # A start that came to no checkpoint of its own took nothing that is used.
        seconds = max(0.0, (checkpoint / TRAINER_STATE_NAME).stat().st_mtime - began)
        earlier = _read_earlier(folder)
        if seconds not in earlier[-1:]:  # or noted by a start that was interrupted at once
            write_json(folder / EARLIER_NAME, [*earlier, seconds])

    @contextmanager
    def claim(self, run: Run, role: Literal["owner", "worker"] = "owner") -> Iterator[bool]:
        """Take a run for this process; says False where another one has it in the same role.

        An owner starts workers. A worker that outlives its owner still has its own lock.
        """
        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{run.key}-{role}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def model(self, run: Run, reading: Reading) -> ModelSpec:
        """Name the model that a reading evaluates."""
        base = build_section("model", self.place(run.settings["model"]), ModelSpec)
        if not run.untuned:
            base = replace(base, name=str(self.run_folder(run)))
        return replace(base, top_k=reading.top_k)

    def plan(self, reading: Reading, options: Mapping[str, Any]) -> EvaluationPlan:
        """Turn a reading into what `evaluate` takes.

        Args:
            reading: The reading.
            options: Further fields of the plan that change no result, or are the user's to say:
                `data_dir`, `judge`.

        Returns:
            The plan.
        """
        from depthmix.evaluation.conversations import MTBenchSpec
        from depthmix.evaluation.plan import EvaluationPlan

        fields = asdict(reading).items()
        settings: dict[str, Any] = {
            name: value for name, value in fields if name not in NOT_OF_A_PLAN
        }
        settings |= {
            name: options[name] for name in options if name != "judge" or reading.is_judged
        }
        if reading.mt_bench is not None:
            answering = {"batch_size": reading.batch_size, **reading.mt_bench}
            settings["mt_bench"] = build_section("mt_bench", answering, MTBenchSpec)
        if reading.records is not None:
            settings["records"] = str(self._made_file(reading.records, "test"))
        return EvaluationPlan(**settings)

    def place(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Put files in the place of names of what is made on the spot, in settings of a run."""
        placed = to_jsonable_python(settings)
        if placed.get("name") == TOY:
            from depthmix_replication.toy import write_toy_model

            with self._toy_lock():
                placed["name"] = str(write_toy_model(self.root / TOY / "model"))
        if str(placed.get("train")).startswith((f"{TOY}:", f"{MADE}:")):
            placed["train"] = str(self._made_file(placed["train"], "train"))
        return {
            name: self.place(value) if isinstance(value, Mapping) else value
            for name, value in placed.items()
        }

    def _made_file(self, name: str, split: str) -> Path:
        origin, _, kind = name.partition(":")
        with self._toy_lock():
            if origin == MADE:
                from depthmix_replication.problems import write_problems

                return write_problems(self.root / MADE, split)
            from depthmix_replication.toy import write_toy_records

            return write_toy_records(self.root / TOY, kind, split)

    def _toy_lock(self) -> FileLock:
        """Let one process write what is made on the spot, while others that need it wait."""
        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{TOY}.lock")


def read_seconds(folder: Path) -> float:
    """Read how long a finished training took, with its earlier starts if it was interrupted.

    Args:
        folder: Folder of the run.

    Returns:
        Seconds of wall time; of an earlier start, up to the checkpoint from which the run went on.
    """
    results = json.loads((folder / RESULTS_NAME).read_text("utf-8"))
    return results["metrics"]["total_seconds"] + sum(_read_earlier(folder))


def _read_earlier(folder: Path) -> list[float]:
    path = folder / EARLIER_NAME
    return json.loads(path.read_text("utf-8")) if path.is_file() else []


def write_json(path: Path, content: Any) -> None:
    """Write JSON by `write_whole`."""
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def check_place(name: str, folder: Path) -> None:
    """Refuse a folder that cannot be made, since a file is in its place or above it.

    Args:
        name: The option, for messages.
        folder: The folder, which need not exist.

    Raises:
        NotADirectoryError: If it cannot be made.
    """
    found = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if found.exists() and not found.is_dir():
        raise NotADirectoryError(
            f"`{name}` must be a folder, and {found} is a file; choose another place."
        )
