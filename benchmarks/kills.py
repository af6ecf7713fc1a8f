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
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from children import FAILED, NO_ROOM, finish, spawn
from results import parse_arguments, write_results
from subjects import (
    TRAINED,
    Subject,
    evaluation_subject,
    prepare,
    reproduction_subject,
    training_subject,
)

from depthmix.files.versions import find_commit

SEED = 20


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
