"""Runs that are killed at random moments, or whose disk becomes full, and then go on.

Each trial starts a command in a process of its own, kills it (SIGKILL, the whole group) at a moment
that is uniform over the time of an uninterrupted one, starts it again as its user would, one time
in three kills that, too, and at last lets it end. Nothing is lost if the outcome is that of the
uninterrupted one: of `train` the weights and the records of the run bit for bit (what was logged,
measured and chosen, without times), of `evaluate` all numbers and samples, of `reproduce` the runs
and their readings under the same pages. A full disk is a limit on the length of files that comes
into force at a random moment (RLIMIT_FSIZE): the command must say in a sentence that there is no
room, and go on later.

`reproduce` trains and reads its runs in the process that is killed, without the seconds of imports
of the processes that it would start. `--repeat train-17` repeats one trial and keeps its folder;
`--only train` leaves the others.
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from results import parse_arguments, write_results

import depthmix_replication.reproduce as reproduction
from depthmix.evaluation.harness import evaluate
from depthmix.evaluation.plan import EvaluationPlan
from depthmix.files.versions import find_commit
from depthmix.models.spec import ModelSpec
from depthmix.trainers.checkpoints import list_checkpoints
from depthmix.training.config import load_run_config
from depthmix.training.train import train
from depthmix_replication.planning import plan
from depthmix_replication.toy import write_toy_model
from depthmix_replication.worker import work
from depthmix_replication.workspace import Workspace

SEED = 20
NUM_RECORDS = 22
NO_ROOM, FAILED = 3, 1
"""Exit codes of a child."""

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


def spawn(action: Callable[[], None], *, full: tuple[float, int] | None = None) -> tuple[int, int]:
    """Run something in a process group of its own; give its id and a pipe with its last words."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        with suppress(ProcessLookupError, PermissionError):
            os.setpgid(child, child)  # here and there, whichever comes first
        os.close(writing)
        return child, reading
    os.setpgid(0, 0)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    code = 0
    try:
        if full is not None:
            moment, limit = full
            bounds = (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
            timer = threading.Timer(
                moment, resource.setrlimit, args=(resource.RLIMIT_FSIZE, bounds)
            )
            timer.daemon = True
            timer.start()
        action()
    except OSError as error:
        code = NO_ROOM if "must be a place with room" in str(error) else FAILED
        os.write(writing, traceback.format_exc()[-3000:].encode())
    except BaseException:
        code = FAILED
        os.write(writing, traceback.format_exc()[-3000:].encode())
    os._exit(code)


def finish(child: int, pipe: int, *, kill_after: float | None = None) -> tuple[int | None, str]:
    """Wait for a child, or kill it; None stands for a killed one."""
    began = time.perf_counter()
    killed = False
    while True:
        ended, status = os.waitpid(child, os.WNOHANG if kill_after is not None else 0)
        if ended:
            break
        left = kill_after - (time.perf_counter() - began) if kill_after is not None else 0.0
        if left <= 0:
            os.killpg(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            killed = os.WIFSIGNALED(status)
            break
        time.sleep(min(left, 0.005))
    words = os.read(pipe, 4096).decode(errors="replace")
    os.close(pipe)
    return (None if killed else os.waitstatus_to_exitcode(status)), words


def measure(subject: Subject, folder: Path) -> None:
    """Run a subject twice without interruption: its outcome, which must not vary, and its time."""
    outcomes = []
    for number in range(2):
        place = folder / f"whole-{number}"
        place.mkdir(parents=True)
        began = time.perf_counter()
        code, words = finish(*spawn(lambda place=place: subject.begin(place)))
        subject.seconds = time.perf_counter() - began
        if code:
            raise SystemExit(f"{subject.name} fails without an interruption:\n{words}")
        outcomes.append(subject.read(place))
    subject.reference = outcomes[0]
    if outcomes[0] != outcomes[1]:
        raise SystemExit(f"{subject.name} has two outcomes without an interruption.")


def try_once(subject: Subject, kind: str, seed: int, folder: Path, *, full: bool) -> int:
    """Interrupt a subject, let it end, and compare; give the number of interruptions."""
    draw = random.Random(f"{SEED}-{kind}-{seed}")
    place = folder / f"{kind}-{seed}"
    place.mkdir(parents=True)
    action, interruptions, words = subject.begin, 0, ""
    lost = None
    for _ in range(1 + (draw.random() < 1 / 3)):
        moment = draw.uniform(0, subject.seconds)
        limit = draw.choice([0, 40, 400, 2000, 4000, 8000])
        if full:
            code, words = finish(
                *spawn(lambda: action(place), full=(moment, limit))  # noqa: B023
            )
            interrupted = code == NO_ROOM
            lost = f"no sentence: {words}" if code == FAILED else lost
        else:
            code, words = finish(*spawn(lambda: action(place)), kill_after=moment)  # noqa: B023
            interrupted = code is None
            lost = f"goes on with an error: {words}" if code else lost
        interruptions += interrupted
        if interrupted:
            subject.stages[subject.stage(place)] += 1
        action = subject.go_on
    if lost is None:
        code, words = finish(*spawn(lambda: subject.go_on(place)))
        if code:
            lost = f"cannot go on: {words}"
        elif (outcome := subject.read(place)) != subject.reference:
            lost = f"another outcome: {_first_difference(outcome, subject.reference)}"
    subject.trials += 1
    if lost is not None:
        subject.lost.append(f"{kind}-{seed}")
        print(
            f"LOST {kind}-{seed} ({subject.name}): {lost}\nRepeat it by "
            f"`python benchmarks/kills.py --repeat {kind}-{seed}`.",
            file=sys.stderr,
            flush=True,
        )
    else:
        shutil.rmtree(place)
    return interruptions


def _first_difference(found: Any, expected: Any, path: str = "") -> str:
    """Say where two outcomes part."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for name in {**found, **expected}:
            if found.get(name) != expected.get(name):
                return _first_difference(found.get(name), expected.get(name), f"{path}/{name}")
    if isinstance(found, list) and isinstance(expected, list):
        if len(found) != len(expected):
            return f"{path}: {len(found)} entries instead of {len(expected)}"
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            if one != other:
                return _first_difference(one, other, f"{path}[{number}]")
    return f"{path}: {str(found)[:200]} instead of {str(expected)[:200]}"


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


def main() -> None:
    """Interrupt, go on, compare, write."""
    arguments = parse_arguments(
        __doc__ or "",
        "kills",
        repeat="a trial that was lost, such as train-17; runs nothing else",
        only="train, full_disk, evaluate or reproduce: what else is in the output stays there",
    )
    arguments.threads = 1
    torch.set_num_threads(1)
    gc.freeze()
    size = 0 if arguments.toy else 1 if arguments.quick else 2
    targets = {"train": (5, 20, 200), "evaluate": (1, 4, 50), "reproduce": (1, 1, 20)}
    targets |= {"full_disk": (5, 10, 50)}
    folder = Path(tempfile.mkdtemp())
    prepare_in_child(folder / "inputs")
    trained = [
        training_subject(name, sections, folder / "inputs") for name, sections in TRAINED.items()
    ]
    kinds = {
        "train": trained,
        "evaluate": [evaluation_subject(folder / "inputs")],
        "reproduce": [reproduction_subject()],
        "full_disk": [
            training_subject(name, sections, folder / "inputs")
            for name, sections in TRAINED.items()
        ],
    }
    repeated = str(arguments.repeat).rpartition("-") if arguments.repeat else None
    only = repeated[0] if repeated else str(arguments.only) if arguments.only else None
    found: dict[str, Any] = {}
    if only and not repeated and arguments.output.is_file():
        found = json.loads(arguments.output.read_text("utf-8"))["kinds"]
    for kind, subjects in kinds.items():
        if only not in (None, kind):
            continue
        for subject in subjects:
            measure(subject, folder / kind / subject.name.replace(" ", "-"))
            print(f"{kind}, {subject.name}: {subject.seconds:.1f} s", file=sys.stderr, flush=True)
        seeds = iter([int(repeated[2])] if repeated else range(10**6))
        interruptions, target = 0, targets[kind][size]
        for seed in seeds:
            subject = subjects[seed % len(subjects)]
            count = try_once(subject, kind, seed, folder, full=kind == "full_disk")
            subject.kills += count
            interruptions += count
            if interruptions >= target:
                break
        found[kind] = {
            "interruptions": interruptions,
            "trials": sum(subject.trials for subject in subjects),
            "lost": [name for subject in subjects for name in subject.lost],
            "seconds": {subject.name: round(subject.seconds, 2) for subject in subjects},
            "kills": {subject.name: subject.kills for subject in subjects},
            "stages": dict(sum((subject.stages for subject in subjects), Counter())),
            "commit": find_commit(Path(__file__)),
        }
        print(f"{kind}: {found[kind]}", file=sys.stderr, flush=True)
    lost = sum(len(entry["lost"]) for entry in found.values())
    if repeated:
        print(f"The folder is kept in {folder}.")
    else:
        ratios = {f"{kind}_lost": float(len(entry["lost"])) for kind, entry in found.items()}
        write_results(arguments, {"seed": SEED, "kinds": found, "ratios": ratios})
        shutil.rmtree(folder)
    raise SystemExit(1 if lost else 0)


def prepare_in_child(inputs: Path) -> None:
    """Make inputs, and a tuned run to evaluate, in a process that ends: this one only forks."""
    inputs.mkdir(parents=True)
    tuned = training_subject("tuned", {"training": {"max_steps": 3}}, inputs)

    def make() -> None:
        prepare(inputs)
        tuned.begin(inputs)
        (inputs / "run").rename(inputs / "tuned")

    code, words = finish(*spawn(make))
    if code:
        raise SystemExit(f"The inputs cannot be made:\n{words}")


if __name__ == "__main__":
    main()
