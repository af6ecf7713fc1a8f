"""Records for exits, as tokens: what they learn from, and what they are read on."""

from __future__ import annotations

import random
from dataclasses import dataclass

from depthmix.data.records import load_records, to_instructions
from depthmix.data.selection import select_records
from depthmix.data.spec import DataSpec
from depthmix.data.tokens import to_token_sequences
from depthmix.depth.lesson import Row, list_targets
from depthmix.method.config import IGNORE_INDEX
from depthmix.models.loading import load_tokenizer
from depthmix.models.spec import ModelSpec
from depthmix.models.template import recall_template

NUM_HELD_OUT = 64
"""Records on which exits are read at most."""

NUM_READ_TOKENS = 32
"""Tokens per record that are read at most, drawn at random: each takes the head once per exit."""


@dataclass(frozen=True)
class ExitRecords:
    """Records as tokens, with those of the completion as labels."""

    learnt: list[Row]
    """What exits learn from."""

    held_out: list[Row]
    """What they are read on, of which only some tokens count."""


def gather_records(
    spec: ModelSpec, section: DataSpec, *, max_length: int | None, seed: int
) -> ExitRecords:
    """Read the records to learn from and those held out, as the model's own training has them.

    Args:
        spec: The model; a run, or a checkpoint of one, remembers how it was trained.
        section: The records. Its `eval` is held out; without one the last of `train` are, a tenth
            of them, and `NUM_HELD_OUT` at most. A template other than `auto` stands for the run's.
        max_length: Tokens per record that are run, from its start; `None` runs all.
        seed: Of which held-out tokens count.

    Returns:
        The records as tokens.

    Raises:
        ValueError: If a record does not fit, there is one alone, or nothing is left to predict.
        OSError: If there are no such records.
    """
    tokenizer = load_tokenizer(spec)
    asked = None if section.template in ("auto", "lm-eval") else section.template
    template = recall_template(spec, asked)
    chosen = section.template if section.template == "lm-eval" else template.template
    selection = select_records(section)
    records = to_instructions(selection.records, section.train)
    if section.eval is not None:
        rest = load_records(section.eval, split=section.eval_split, limit=NUM_HELD_OUT)
    elif len(records) < 2:
        raise ValueError(
            f"`data.train` must hold 2 records at least, of which one is held out, and "
            f"{section.train} holds {len(records)}; add records, or name others as `data.eval`."
        )
    else:
        num_held_out = min(NUM_HELD_OUT, max(len(records) // 10, 1))
        records, rest = records[:-num_held_out], records[-num_held_out:]
    options = {"max_length": max_length, "variables": template.variables}
    learnt, held_out = (
        to_token_sequences(part, chosen, tokenizer, **options) for part in (records, rest)
    )
    for option, rows in (("data.train", learnt), ("data.eval", held_out)):
        if not any(map(list_targets, rows)):
            raise ValueError(
                f"`{option}` must hold records with something to predict in their first "
                f"{max_length} tokens, and none of {len(rows)} has; raise `max_length`."
            )
    numbers = random.Random(seed)
    return ExitRecords([*learnt], [_thin(row, numbers) for row in held_out])


def _thin(row: dict[str, list[int]], numbers: random.Random) -> Row:
    """Keep `NUM_READ_TOKENS` labels of a row at most, at random places."""
    labels = row["labels"]
    places = [place for place, label in enumerate(labels) if place and label != IGNORE_INDEX]
    kept = set(numbers.sample(places, min(NUM_READ_TOKENS, len(places))))
    labels = [label if place in kept else IGNORE_INDEX for place, label in enumerate(labels)]
    return {**row, "labels": labels}
