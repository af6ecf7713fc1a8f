"""A tiny random model that stands for a tuned one in a test of a benchmark's parts."""

from __future__ import annotations

from pathlib import Path

from tuned_model import TunedModel, put_exits, tune

from depthmix_replication.toy import write_toy_model

TOY_HELD_OUT = 123
"""Problems that it has not seen; fewer would not hold a bound for unverified texts."""


def make_toy(folder: Path) -> TunedModel:
    """Train a tiny random model as the real one was.

    Args:
        folder: Where it goes.
    """
    base = write_toy_model(folder / "base-model")
    tuned = tune(folder, num_steps=1, num_held_out=TOY_HELD_OUT, base=base)
    put_exits(tuned, layers=(2, 4, 6), rank=2, num_steps=1)
    return tuned
