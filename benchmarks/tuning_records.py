"""What the tuned models of the benchmarks of generation learn, and what they are asked."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from depthmix.data.records import load_records
from depthmix_replication.problems import TEMPLATES, make_problems, make_splits

ROOT = Path(__file__).parent.parent

Records = list[dict[str, Any]]
Splits = tuple[Records, Records]
"""To train on, and held out."""

NUM_NEW_TEMPLATES = 4
"""Templates of word problems, the last ones, that a model of `new-templates` never sees."""

MAX_CHARACTERS = 450
"""Length of a record of a data set, so that a step takes about twenty seconds on a core."""

NUM_NEW = 60
"""Held-out problems of these: the first ones, which are asked."""


def find_data() -> Path:
    """Find the folder of data sets: `DEPTHMIX_DATA`, or where the tests look for it."""
    return Path(os.environ.get("DEPTHMIX_DATA", ROOT.parent / "shared" / "data"))


def split_problems(num_training: int, num_held_out: int) -> Splits:
    """Make word problems; what is held out is of the same templates."""
    return make_splits(num_training, num_held_out, seed=0)


def split_templates(num_training: int, num_held_out: int) -> Splits:
    """Make word problems; those that are asked are of templates that nothing else has."""
    known, new = TEMPLATES[:-NUM_NEW_TEMPLATES], TEMPLATES[-NUM_NEW_TEMPLATES:]
    total = num_training + num_held_out - NUM_NEW
    problems = make_problems(total, 0, known)
    return problems[:num_training], make_problems(NUM_NEW, 1, new) + problems[num_training:]


def split_data_set(name: str, num_training: int, num_held_out: int) -> Splits:
    """Read a data set's training records as instructions, none longer than `MAX_CHARACTERS`."""
    records = [
        {field: record[field] for field in ("instruction", "input", "output")}
        for record in load_records(name, data_dir=find_data())
    ]
    short = [record for record in records if sum(map(len, record.values())) <= MAX_CHARACTERS]
    needed = num_training + num_held_out
    if len(short) < needed:
        raise ValueError(f"`steps` needs {needed} records of {name}, and there are {len(short)}.")
    return short[:num_training], short[num_training:needed]


DATA_SETS = ("gsm8k", "alpaca")
"""Those that are read, not made."""

SPLITS: dict[str, Callable[[int, int], Splits]] = {
    "problems": split_problems,
    "new-templates": split_templates,
    **{name: partial(split_data_set, name) for name in DATA_SETS},
}
"""By name: numbers of records to train on and to hold out, to the records."""
