"""Which records of its training set a run trains on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from depthmix.data.audit import audit_records
from depthmix.data.records import check_limit, load_published
from depthmix.data.spec import DataSpec


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The records that a run trains on, and what became of the others."""

    records: list[dict[str, Any]]
    """As they are published, in the order of selection; those of a named data set in its schema."""

    numbers: tuple[int, ...]
    """Numbers of `records` in the source, from 1."""

    num_given: int
    """Records that were read; where they keep their order and none is dropped, `limit` at most."""

    num_dropped: int
    """Records among them whose question is in a test set."""

    @property
    def counts(self) -> dict[str, int]:
        """Number of records `given`, `dropped` and `used`, for the run's results."""
        return {"given": self.num_given, "dropped": self.num_dropped, "used": len(self.records)}


def select_records(section: DataSpec, *, test_sets: Sequence[str] | None = None) -> Selection:
    """Read the records to train on: in random order, without test questions, up to a limit.

    In this order, so that what is dropped does not change the order of the others.

    Args:
        section: Source and split; `shuffle`, `without` and `limit`.
        test_sets: What to leave out instead of `without`, whose `all` means those at hand.

    Returns:
        The records, at least one.

    Raises:
        ValueError: If the source or a test set is not what it should be, or no record is left.
        OSError: If there is no such file or data set.
    """
    check_limit(section.limit)
    without = section.without if test_sets is None else test_sets
    in_order = section.shuffle is None and not without
    given = load_published(
        section.train, split=section.split, limit=section.limit if in_order else None
    )
    order = list(range(len(given)))
    if section.shuffle is not None:
        random.Random(section.shuffle).shuffle(order)
    leaking = set(audit_records(given, without).leaking if without else ())
    kept = [number for number in order if number not in leaking]
    if not kept:
        raise ValueError(
            f"`data.without` must leave a record to train on, and all {len(given):,} of "
            f"{section.train} ask a question of {', '.join(section.without)}; name fewer test sets."
        )
    used = kept[: section.limit]
    return Selection(
        records=[given[number] for number in used],
        numbers=tuple(number + 1 for number in used),
        num_given=len(given),
        num_dropped=len(leaking),
    )
