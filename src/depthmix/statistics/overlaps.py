"""Which items are solved by which methods, and how far runs agree on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Items that are solved by some methods and by no other."""

    methods: tuple[str, ...]
    """The methods that solve them; empty for the items that none solves."""

    num_items: int
    """How many such items there are, at least one."""


@dataclass(frozen=True, kw_only=True)
class Disagreement:
    """How often a run of one method solves what a run of another does not, or the reverse."""

    methods: tuple[str, str]
    """The methods; the same one twice for runs that differ in their seed alone."""

    share: float
    """Share of items on which two runs disagree, 0 to 1, on average over the pairs of runs."""

    num_pairs: int
    """Pairs of runs."""


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


def measure_disagreements(
    tables: Mapping[str, Float[np.ndarray, "_ items"]],
) -> tuple[Disagreement, ...]:
    """Compare how far runs of two methods disagree with how far the seeds of one method do.

    Two methods solve different items only if their runs disagree more than the seeds of either.

    Args:
        tables: For each method, 0 or 1 for every seed and item.

    Returns:
        Each method with itself, where it has several seeds, and then each pair of methods.
    """
    found = []
    same = [(label, label) for label, table in tables.items() if len(table) > 1]
    for first, second in [*same, *combinations(tables, 2)]:
        differs = np.abs(tables[first][:, None] - tables[second]).mean(axis=-1)
        pairs = differs[np.triu_indices(len(differs), k=1)] if first == second else differs.ravel()
        found.append(
            Disagreement(methods=(first, second), share=float(pairs.mean()), num_pairs=len(pairs))
        )
    return tuple(found)
