"""What makes a finished run fast: records held out for it, exits on it, and a plan of drafts."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from depthmix.data.selection import Selection
from depthmix.depth.exit_choice import spread_layers
from depthmix.files.drafts import write_whole
from depthmix.files.runs import HELD_OUT_NAME
from depthmix.models.calibrating import FEWEST_TEXTS, Calibration, calibrate
from depthmix.models.exits import AddedExits, add_exits
from depthmix.training.config import RunConfig

MOST_HELD_OUT = 128
"""Records that are held out at most: the model answers a half of them, and all show which tokens
may be drafted."""

NUM_EXIT_STEPS = 96
"""Steps of 16 that train the exits, as for the published numbers."""


def hold_out(selection: Selection) -> tuple[Selection, Selection]:
    """Keep the last records from training: a tenth, `FEWEST_TEXTS` at least.

    Args:
        selection: Records of a run that has no others to calibrate on.

    Returns:
        Those to train on, and those that are held out.

    Raises:
        ValueError: If there are too few.
    """
    number = len(selection.records)
    if number < 2 * FEWEST_TEXTS:
        raise ValueError(
            f'`preset="fast"` needs at least {2 * FEWEST_TEXTS} records in `data.train`, of which '
            f"{FEWEST_TEXTS} are held out to calibrate drafts, got {number}; add records, or name "
            "others as `data.eval`."
        )
    kept = number - min(MOST_HELD_OUT, max(FEWEST_TEXTS, number // 10))
    parts = slice(None, kept), slice(kept, None)
    first, last = (
        replace(selection, records=selection.records[part], numbers=selection.numbers[part])
        for part in parts
    )
    return first, last


def check_held_out(
    records: Sequence[Mapping[str, Any]], *, source: str
) -> Sequence[Mapping[str, Any]]:
    """Refuse records that are too few to calibrate on, before anything is trained.

    Args:
        records: Held out, as training writes them.
        source: Where they come from.

    Returns:
        The first `MOST_HELD_OUT` of them.

    Raises:
        ValueError: If there are too few.
    """
    if len(records) < FEWEST_TEXTS:
        raise ValueError(
            f'`data.eval` must hold at least {FEWEST_TEXTS} records with `preset="fast"`, which '
            f"calibrates drafts on them, got {len(records)} in {source}; add some, or leave it out "
            "to hold out a part of `data.train`."
        )
    return records[:MOST_HELD_OUT]


def save_held_out(records: Sequence[Mapping[str, Any]], output_dir: Path) -> Path:
    """Write the records that are held out into the run's folder, as JSONL."""
    lines = (json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records)
    return write_whole(output_dir / HELD_OUT_NAME, "".join(lines))


def make_fast(
    config: RunConfig, output_dir: Path, *, num_records: int, num_hidden_layers: int
) -> tuple[AddedExits, Calibration]:
    """Put exits on a finished run, and calibrate how they draft.

    The exits lie at `spread_layers`, and calibration chooses among them. They learn what the run
    learnt, and are read and calibrated on what it has not seen. The run's own weights stay as they
    are. What happens is said on standard error.

    Args:
        config: The run's settings.
        output_dir: Its folder, with its adapter and the records that are held out.
        num_records: Records that it was trained on.
        num_hidden_layers: Layers of its model.

    Returns:
        What each exit predicts, and how they draft.

    Raises:
        ValueError: If a setting does not fit.
        OSError: If the folder cannot be written.
    """
    layers, held_out = spread_layers(num_hidden_layers), output_dir / HELD_OUT_NAME
    _say(
        f"The run is finished. Now exits learn to draft for it, at {len(layers)} of its "
        f"{num_hidden_layers} layers and in {NUM_EXIT_STEPS} steps; its answers stay as they are."
    )
    added = add_exits(
        output_dir,
        replace(config.data, limit=num_records, eval=str(held_out)),
        layers=layers,
        num_steps=NUM_EXIT_STEPS,
        max_length=config.training.get("max_length", 1024),
        seed=config.training.get("seed", 0),
        overwrite=True,  # those of an interrupted run, whose adapter was another
        on_step=_say_step,
    )
    _say(
        f"Now the run answers records of {held_out}, and its layers are timed, to find out which "
        "exits draft here and how sure they must be."
    )
    return added, calibrate(output_dir, held_out)


def _say_step(step: int, losses: dict[int, float]) -> None:
    """Say every sixteenth step how the exits are doing."""
    if step == 1 or step % 16 == 0:
        mean = sum(losses.values()) / len(losses)
        _say(f"exits: step {step} of {NUM_EXIT_STEPS}, mean loss {mean:.3f}")


def _say(sentence: str) -> None:
    """Tell the user, at once."""
    print(sentence, file=sys.stderr, flush=True)
