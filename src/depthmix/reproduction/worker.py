"""What one process does: train the runs of an assignment, then read them.

Started as `accelerate launch -m depthmix.reproduction.worker ASSIGNMENT`, on one or more devices.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from depthmix.data.selection import select_records
from depthmix.data.templates import render_prompt
from depthmix.evaluation.generation_speed import measure_generation
from depthmix.evaluation.harness import evaluate
from depthmix.evaluation.judge import JudgeSection
from depthmix.models import load_model, load_tokenizer
from depthmix.options import build_section
from depthmix.reproduction.trials import Reading, Run
from depthmix.reproduction.workspace import FINISHED_NAME, Workspace
from depthmix.run_config import load_run_config
from depthmix.training import choose_form, train

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
        path.write_text(json.dumps(content, ensure_ascii=False) + "\n", "utf-8")
        return path

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
    """Train what is not trained, on all devices; then read it, on the first one.

    Args:
        assignment: The runs. Whoever calls this holds their locks.
    """
    workspace = Workspace(assignment.root)
    if assignment.data_dir is not None:
        os.environ["DEPTHMIX_DATA"] = assignment.data_dir
    for run, _ in assignment.runs:
        if not workspace.is_trained(run):
            _train(workspace, run)
    if int(os.environ.get("RANK", "0")) > 0:
        return
    options: dict[str, Any] = {"data_dir": assignment.data_dir}
    if assignment.judge is not None:
        options["judge"] = build_section("judge", assignment.judge, JudgeSection)
    for run, readings in assignment.runs:
        workspace.describe(run)
        for reading in workspace.missing(run, readings):
            _read(workspace, run, reading, options)


def _train(workspace: Workspace, run: Run) -> None:
    """Train a run, from its last checkpoint where it was interrupted."""
    folder = workspace.run_folder(run)
    settings = workspace.place(run.settings)
    settings["training"] = {**settings["training"], "output_dir": str(folder)}
    train(load_run_config(None, settings), resume=workspace.has_checkpoint(run))


def _read(workspace: Workspace, run: Run, reading: Reading, options: Mapping[str, Any]) -> None:
    """Evaluate a run in one way, and time its generation."""
    started = time.monotonic()
    folder, section = workspace.reading_folder(run, reading), workspace.model(run, reading)
    results = evaluate(section, workspace.plan(reading, options), output_dir=folder, overwrite=True)
    if not workspace.is_timed(run, reading):
        model, tokenizer = load_model(section).eval(), load_tokenizer(section)
        data = load_run_config(None, workspace.place(run.settings)).data
        chosen = select_records(data).records[:NUM_PROMPTS]
        records = choose_form(data)(chosen, data.train)
        prompts = [render_prompt(record, data.template, tokenizer) for record in records]
        speeds = measure_generation(model, tokenizer, prompts, top_ks=reading.speed)
        text = json.dumps([asdict(speed) for speed in speeds], indent=1)
        workspace.speed_file(run).write_text(text + "\n", "utf-8")
    facts = {"tasks": list(results["depthmix"]["data"]), "seconds": time.monotonic() - started}
    (folder / FINISHED_NAME).write_text(json.dumps(facts) + "\n", "utf-8")


if __name__ == "__main__":
    work(Assignment.load(Path(sys.argv[1])))
