"""Which items are solved by which methods: the counts of a Venn diagram."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Items that are solved by some methods and by no other."""

    methods: tuple[str, ...]
    """The methods that solve them; empty for the items that none solves."""

    num_items: int
    """How many such items there are, at least one."""


def count_overlaps(tables: Mapping[str, Float[np.ndarray, "_ items"]]) -> tuple[Overlap, ...]:
    """Count the items that each set of methods solves and the others do not: a Venn diagram.

    A method with several seeds solves an item if more than half of its seeds do; a tie is no
    majority.

    Args:
        tables: For each method, 0 or 1 for every seed and item.

    Returns:
        The sets with at least one item, small sets first.
    """
    solved = np.array([table.mean(axis=0) > 0.5 for table in tables.values()])
    labels = np.array(list(tables), dtype=object)
    patterns, counts = np.unique(solved, axis=1, return_counts=True)
    sets = sorted(
        zip(patterns.T.tolist(), counts.tolist(), strict=True),
        key=lambda entry: (sum(entry[0]), [not member for member in entry[0]]),
    )
    return tuple(
        Overlap(methods=tuple(labels[np.array(pattern)].tolist()), num_items=count)
        for pattern, count in sets
    )
