"""Commands that are interrupted, and what must not be lost of each."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import depthmix_replication.reproduce as reproduction
from depthmix.evaluation.harness import evaluate
from depthmix.evaluation.plan import EvaluationPlan
from depthmix.models.spec import ModelSpec
from depthmix.training.config import load_run_config
from depthmix.training.train import train
from depthmix.training.trainers.checkpoints import list_checkpoints
from depthmix_replication.planning import plan
from depthmix_replication.toy import write_toy_model
from depthmix_replication.worker import work
from depthmix_replication.workspace import Workspace

NUM_RECORDS = 22

TRAINED: dict[str, dict[str, Any]] = {
    "steps, evaluation before": {
        "training": {"max_steps": 7, "save_steps": 3, "logging_steps": 2, "seed": 3},
        "evaluation": {"data": "items.jsonl", "metric": "choices"},
    },
    "LoRA, epochs": {
        "method": "lora",
        "training": {
            "num_train_epochs": 2,
            "save_strategy": "epoch",
            "logging_strategy": "epoch",
            "eval_strategy": "epoch",
        },
        "data": {"eval": "records.jsonl"},
    },
    "the best checkpoint": {
        "training": {
            "max_steps": 8,
            "save_steps": 2,
            "eval_steps": 2,
            "eval_strategy": "steps",
            "load_best_model_at_end": True,
            "save_total_limit": 1,
            "learning_rate": 0.2,
        },
        "data": {"eval": "records.jsonl"},
    },
    "accumulation, checkpoints removed": {
        "training": {
            "num_train_epochs": 2,
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 2,
            "save_steps": 2,
            "save_total_limit": 2,
            "logging_steps": 3,
        },
    },
    "layers chosen": {
        "mode": {"late_layers": "auto"},
        "training": {"max_steps": 5, "save_steps": 1, "logging_steps": 1},
    },
}
"""Runs that are killed: each has something of its own to lose."""


@dataclass
class Subject:
    """A command, and what must not be lost of it."""

    name: str
    begin: Callable[[Path], None]
    """The command in a folder of its own."""

    go_on: Callable[[Path], None]
    """The same after an interruption."""

    read: Callable[[Path], Any]
    """What must be as without one."""

    stage: Callable[[Path], str]
    """How far it had come, for the table."""

    reference: Any = None
    seconds: float = 0.0
    kills: int = 0
    trials: int = 0
    lost: list[str] = field(default_factory=list)
    stages: Counter[str] = field(default_factory=Counter)


def untimed(content: Any) -> Any:
    """Leave out what depends on the clock and the place."""
    clock = ("seconds", "runtime", "per_second", "memory_gib", "earlier")
    if isinstance(content, dict):
        return {
            name: untimed(value)
            for name, value in content.items()
            if not any(word in name for word in clock)
        }
    return [untimed(value) for value in content] if isinstance(content, list) else content


def prepare(folder: Path) -> None:
    """Make a model, training records and items for all subjects."""
    write_toy_model(folder / "base")
    sums = [(f"{n} + {n + 1} =", f" {2 * n + 1}") for n in range(NUM_RECORDS)]
    rows = {
        "records": [{"prompt": prompt, "completion": answer} for prompt, answer in sums],
        "items": [
            {"prompt": prompt, "choices": [answer, " no", " 7"], "answer": 0}
            for prompt, answer in sums[:8]
        ],
        "questions": [{"prompt": prompt, "answer": answer} for prompt, answer in sums[:6]],
    }
    for name, records in rows.items():
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text, "utf-8")


def training_subject(name: str, sections: dict[str, Any], inputs: Path) -> Subject:
    """Make a run of `depthmix train`."""

    def start(place: Path, **options: Any) -> None:
        given = json.loads(json.dumps(sections))
        for section, option in (("data", "eval"), ("evaluation", "data")):
            if option in given.get(section, {}):
                given[section][option] = str(inputs / given[section][option])
        train(
            load_run_config(
                overrides={
                    **given,
                    "model": {"name": str(inputs / "base"), "dtype": "float32"},
                    "data": {"train": str(inputs / "records.jsonl"), **given.get("data", {})},
                    "mode": {
                        "late_layers": 2,
                        "target_modules": ["q_proj", "v_proj"],
                        "lora_dropout": 0.1,
                        **given.get("mode", {}),
                    },
                    "training": {
                        "output_dir": str(place / "run"),
                        "per_device_train_batch_size": 4,
                        "learning_rate": 1e-2,
                        "report_to": "none",
                        "disable_tqdm": True,
                        **given["training"],
                    },
                }
            ),
            **options,
        )

    def read(place: Path) -> Any:
        results = json.loads((place / "run" / "results.json").read_text("utf-8"))
        outcome = untimed({k: v for k, v in results.items() if k != "versions"})
        outcome["weights"] = (place / "run" / "adapter_model.safetensors").read_bytes().hex()
        return outcome

    def stage(place: Path) -> str:
        run = place / "run"
        if not (run / "run_config.json").is_file():
            return "before the first step"
        if (run / "results.json").is_file():
            return "when all was written"
        found = list_checkpoints(run)
        if found.incomplete:
            return "while a checkpoint was written"
        if not found.whole:
            return "before a checkpoint"
        state = json.loads((found.whole[-1] / "trainer_state.json").read_text("utf-8"))
        done = state["global_step"] >= state["max_steps"]
        return "after the last step" if done else "between checkpoints"

    return Subject(name, start, lambda place: start(place, resume=True), read, stage)


def evaluation_subject(inputs: Path) -> Subject:
    """Make two evaluations of a run into one folder."""

    def start(place: Path) -> None:
        model = ModelSpec(name=str(inputs / "tuned"), dtype="float32")
        for name, metric in (("items", "choices"), ("questions", "exact_match")):
            plan = EvaluationPlan(
                records=str(inputs / f"{name}.jsonl"), metric=metric, batch_size=4
            )
            evaluate(model, plan, output_dir=place / "out")

    def read(place: Path) -> Any:
        results = json.loads((place / "out" / "results.json").read_text("utf-8"))
        samples = {
            path.name: [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            for path in sorted((place / "out").glob("samples_*.jsonl"))
        }
        kept = ("results", "n-samples", "higher_is_better", "depthmix")
        return untimed({**{key: results[key] for key in kept}, "samples": samples})

    def stage(place: Path) -> str:
        out = place / "out"
        if not (out / "evaluation.json").is_file():
            return "before the first answer"
        if not (out / "results.json").is_file():
            return "in the first records"
        results = json.loads((out / "results.json").read_text("utf-8"))
        both = len(results["depthmix"]["data"]) == 2
        return "when all was written" if both else "in the second records"

    return Subject("evaluate", start, start, read, stage)


def reproduction_subject() -> Subject:
    """Make an experiment at the scale toy, in one process."""

    def launch(assignments: Any, launcher: Any) -> Any:
        for assignment in assignments:
            for run, readings in assignment.runs:
                workspace = Workspace(assignment.root)
                if not workspace.is_finished(run, readings):
                    workspace.clear(run)
            work(assignment)
            yield assignment

    def start(place: Path) -> None:
        reproduction.launch = launch
        planned = plan(["fig6"], scale="toy", workspace=place)
        list(reproduction.reproduce(planned))

    def read(place: Path) -> Any:
        outcome: dict[str, Any] = {}
        for run in sorted((place / "runs").iterdir()):
            results = json.loads((run / "results.json").read_text("utf-8"))
            outcome[run.name] = {
                "log": untimed(results["log_history"]),
                "weights": (run / "adapter_model.safetensors").read_bytes().hex(),
                "readings": {
                    path.parent.name: untimed(json.loads(path.read_text("utf-8"))["results"])
                    for path in sorted(run.glob("evaluation/*/results.json"))
                },
            }
        outcome["pages"] = sorted(
            str(path.relative_to(place)) for path in (place / "results").rglob("*.*")
        )
        return outcome

    def stage(place: Path) -> str:
        done = len(list(place.glob("runs/*/evaluation/*/finished.json")))
        return f"{done} runs read"

    return Subject("reproduce", start, start, read, stage)
