"""What one process does: train the runs of an assignment, then read them.

Started as `accelerate launch -m depthmix_replication.worker ASSIGNMENT`, on one or more devices.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from depthmix.data.selection import select_records
from depthmix.data.source_files import DATA_VARIABLE
from depthmix.data.templates import render_prompt
from depthmix.evaluation.generation_speed import measure_generation
from depthmix.evaluation.harness import evaluate
from depthmix.evaluation.identity import DEFAULT_BATCH
from depthmix.evaluation.judge import JudgeSpec
from depthmix.files.drafts import write_whole
from depthmix.files.settings import build_section
from depthmix.models.loading import load_model, load_tokenizer
from depthmix.training.config import load_run_config
from depthmix.training.material import choose_form
from depthmix.training.train import train
from depthmix_replication.runs import Reading, Run
from depthmix_replication.test_sets import fetch_test_sets
from depthmix_replication.workspace import FINISHED_NAME, Workspace, write_json

NUM_PROMPTS = 4
"""Prompts after which generation is timed."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Runs for one process, and what it may not know by itself."""

    root: Path
    """Folder of the workspace."""

    runs: Sequence[tuple[Run, tuple[Reading, ...]]]
    """Runs with the ways to read them."""

    data_dir: str | None = None
    """Local folder of data sets."""

    judge: Mapping[str, Any] | None = None
    """Options of the judge."""

    def save(self, path: Path) -> Path:
        """Write it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {**asdict(self), "root": str(self.root)}
        return write_whole(path, json.dumps(content, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Assignment:
        """Read what `save` wrote."""
        content = json.loads(path.read_text("utf-8"))
        runs = [
            (Run(**run), tuple(build_section("reading", one, Reading) for one in readings))
            for run, readings in content["runs"]
        ]
        return cls(**content | {"root": Path(content["root"]), "runs": runs})


def work(assignment: Assignment) -> None:
    """Train what is not trained, on all devices, and read it, on the first one.

    Args:
        assignment: The runs. Whoever calls this has claimed them as their owner.

    Raises:
        RuntimeError: If a run has failed, after all the others are done, or another worker has one
            of them.
    """
    workspace = Workspace(assignment.root)
    if assignment.data_dir is not None:
        os.environ[DATA_VARIABLE] = assignment.data_dir
    options: dict[str, Any] = {"data_dir": assignment.data_dir}
    if assignment.judge is not None:
        options["judge"] = build_section("judge", assignment.judge, JudgeSpec)
    failed: list[str] = []
    rank = int(os.environ.get("RANK", "0"))
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    with ExitStack() as locks:
        if rank == 0:
            for run, _ in assignment.runs:
                if not locks.enter_context(workspace.claim(run, "worker")):
                    raise RuntimeError(
                        f"{run.key} is being run by a worker whose owner has ended; start the same "
                        "command again when that is done."
                    )
        for run, readings in assignment.runs:
            with _noted(run, failed):
                if not workspace.is_trained(run):
                    _train(workspace, run)
                if num_processes == 1:
                    _read_all(workspace, run, readings, options)
        # The other processes must not wait for the first one's evaluations.
        for run, readings in assignment.runs if num_processes > 1 and rank == 0 else ():
            if workspace.is_trained(run):
                with _noted(run, failed):
                    _read_all(workspace, run, readings, options)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(assignment.runs)} runs have failed: {failed}.")


@contextmanager
def _noted(run: Run, failed: list[str]) -> Iterator[None]:
    """Note that a run has failed, and why, and let the others go on."""
    try:
        yield
    except Exception:
        traceback.print_exc()
        failed.append(run.key)


def _read_all(
    workspace: Workspace, run: Run, readings: Sequence[Reading], options: Mapping[str, Any]
) -> None:
    """Evaluate a run in all ways that are missing."""
    workspace.describe(run)
    for reading in workspace.missing(run, readings):
        _read(workspace, run, reading, options)


def _train(workspace: Workspace, run: Run) -> None:
    """Train a run, from its last checkpoint where it was interrupted."""
    folder = workspace.run_folder(run)
    settings = workspace.place(run.settings)
    test_sets = fetch_test_sets(settings["data"].get("without", ()))
    training = share_batch(settings["training"], int(os.environ.get("WORLD_SIZE", "1")))
    settings["training"] = {**training, "output_dir": str(folder)}
    resume = workspace.has_checkpoint(run)
    if resume and int(os.environ.get("RANK", "0")) == 0:
        workspace.note_earlier_start(run)
    train(load_run_config(None, settings), resume=resume, test_sets=test_sets)


def share_batch(training: Mapping[str, Any], num_processes: int) -> dict[str, Any]:
    """Divide a run's batch among its processes, so that a step sees the same records.

    Their number still changes a run as another draw would: each process has its own dropout.

    Args:
        training: The run's section, with the batch of a single process.
        num_processes: Processes that train it.

    Returns:
        The section of each process.

    Raises:
        ValueError: If the batch cannot be divided.
    """
    name = "per_device_train_batch_size"
    batch = training.get(name, DEFAULT_BATCH)
    if batch % num_processes:
        raise ValueError(
            f"`num_processes` must divide the batch of {batch} sequences, got {num_processes}."
        )
    return {**training, name: batch // num_processes} if num_processes > 1 else {**training}


def _read(workspace: Workspace, run: Run, reading: Reading, options: Mapping[str, Any]) -> None:
    """Evaluate a run in one way, and time its generation."""
    started = time.monotonic()
    folder, section = workspace.reading_folder(run, reading), workspace.model(run, reading)
    results = evaluate(section, workspace.plan(reading, options), output_dir=folder, overwrite=True)
    if not workspace.is_timed(run, reading):
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        model, tokenizer = load_model(section).eval(), load_tokenizer(section)
        model.to(accelerator or "cpu")  # pyrefly: ignore[bad-argument-type]
        data = load_run_config(None, workspace.place(run.settings)).data
        selection = select_records(data, test_sets=fetch_test_sets(data.without))
        chosen = selection.records[:NUM_PROMPTS]
        records = choose_form(data)(chosen, data.train)
        prompts = [render_prompt(record, data.template, tokenizer) for record in records]
        speeds = measure_generation(model, tokenizer, prompts, top_ks=reading.speed)
        write_json(workspace.speed_file(run, reading), [asdict(speed) for speed in speeds])
    facts = {"tasks": list(results["depthmix"]["data"]), "seconds": time.monotonic() - started}
    write_json(folder / FINISHED_NAME, facts)


if __name__ == "__main__":
    work(Assignment.load(Path(sys.argv[1])))
