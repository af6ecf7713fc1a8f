"""Thresholds for drafts that nothing verifies, chosen by the texts that stay the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from depthmix.decoding.draft_plan import DraftPlan
from depthmix.depth.binomial import binomial_tail, fewest_trials, highest_share
from depthmix.depth.calibration import MOST_EXITS, list_first_choices
from depthmix.depth.cascade import simulate
from depthmix.depth.confidences import Confidences
from depthmix.depth.costs import Costs

UNVERIFIED_THRESHOLDS = (0.999, 0.998, 0.995, 0.99, 0.98, 0.97, 0.95, 0.925, 0.9, 0.85, 0.8, 0.7)
"""Thresholds of drafts that nothing verifies, in the order in which they are tested."""

LIKELY_THRESHOLD = 0.95
"""The one among them at which their exits are chosen."""


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What a plan without verification promises: how many texts stay the same."""

    target: float
    """Share of the texts that was asked for."""

    num_tested: int
    """Texts on which thresholds were tested."""

    num_changed: int
    """Texts among them that changed."""

    lowest: float
    """Lower bound of the share that stays the same, by Clopper and Pearson at `1 - error`."""

    error: float
    """Chance that the share of other texts which stay the same is below `target` after all."""


def check_promise(texts_unchanged: float, num_tested: int, *, error: float = 0.05) -> None:
    """Refuse a promise that no outcome of the test would allow.

    Args:
        texts_unchanged: Share of the texts that is to stay the same.
        num_tested: Texts to be tested on.
        error: Chance of promising too much.

    Raises:
        ValueError: If the share is none, or there are too few texts even if none of them changes.
    """
    if not 0 < texts_unchanged < 1:
        raise ValueError(
            f"`texts_unchanged` must be a share above 0 and below 1, got {texts_unchanged}; for "
            "all texts let the top verify, which is the default."
        )
    needed = fewest_trials(1 - texts_unchanged, error=error)
    if num_tested < needed:
        raise ValueError(
            f"`texts_unchanged` of {texts_unchanged} needs at least {needed:,} texts to be tested "
            f"on, even if none of them changes, got {num_tested:,}; take more records by "
            "`num_texts` and `data`, half of which are tested on, or ask for a lower share."
        )


def choose_unverified(
    learnt: Confidences,
    tested: Confidences,
    costs: Costs,
    *,
    texts_unchanged: float,
    num_hidden_layers: int,
    error: float = 0.05,
) -> tuple[DraftPlan, Promise]:
    """Choose thresholds without verification by the texts that stay the same (Learn then Test).

    The exits are those that are fastest on `learnt`. Then common thresholds are tested on other
    texts in a fixed order, from the strictest down: "more than `1 - texts_unchanged` of the texts
    change" is refuted where so few changed texts would have a chance of at most `error` by the
    binomial distribution. At the first one that is not refuted, testing ends. So the chance that a
    threshold passes which should not is at most `error`, however many are tested. Of those that
    pass the fastest is taken.

    Args:
        learnt: What exits say of texts that may choose anything.
        tested: What they say of texts that have chosen nothing yet, nor the vocabulary.
        costs: Times of the model's parts.
        texts_unchanged: Share of the texts that is to stay the same, above 0 and below 1.
        num_hidden_layers: Layers of the model.
        error: Chance of promising too much.

    Returns:
        The plan, and what is promised. If no threshold passes, the plan stays dense, and the
        promise is what was seen of the strictest one.

    Raises:
        ValueError: If there are too few texts for any promise, or a share is no share.
    """
    num_tested = len(tested.lengths)
    check_promise(texts_unchanged, num_tested, error=error)
    options = {"num_hidden_layers": num_hidden_layers, "verify": False}

    def rate(choices: Sequence[tuple[int, ...]]) -> list[float]:
        plans = [DraftPlan.for_all(exits, threshold=LIKELY_THRESHOLD) for exits in choices]
        return simulate(learnt, plans, costs, **options).speed_ups().tolist()

    exits = _grow(rate, learnt.layers)
    plans = [
        DraftPlan.for_all(exits, threshold=threshold, vocabulary=tested.vocabulary)
        for threshold in UNVERIFIED_THRESHOLDS
    ]
    found = simulate(tested, plans, costs, **options)
    changes = found.changed.sum(-1).tolist()
    passed = list(
        itertools.takewhile(
            lambda number: binomial_tail(changes[number], num_tested, 1 - texts_unchanged) <= error,
            range(len(plans)),
        )
    )
    speeds = found.speed_ups().tolist()
    taken = max(passed, key=speeds.__getitem__, default=0)
    promise = Promise(
        target=texts_unchanged,
        num_tested=num_tested,
        num_changed=changes[taken],
        lowest=1 - highest_share(changes[taken], num_tested, error=error),
        error=error,
    )
    return replace(plans[taken], stay_dense=not passed), promise


def _grow(
    rate: Callable[[Sequence[tuple[int, ...]]], list[float]], layers: Sequence[int]
) -> tuple[int, ...]:
    """Take the fastest choice of few exits, and add the best further ones while they help."""
    choices, fastest, exits = list(list_first_choices(layers)), 0.0, ()
    while choices:
        speeds = rate(choices)
        if max(speeds) <= fastest:
            break
        fastest = max(speeds)
        exits = choices[speeds.index(fastest)]
        rest = [layer for layer in layers if layer not in exits and len(exits) < MOST_EXITS]
        choices = [tuple(sorted((*exits, layer))) for layer in rest]
    return exits
