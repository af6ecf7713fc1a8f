"""Which plan of drafts is the fastest on recorded texts, and what it promises on others."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from depthmix.decoding.draft_plan import DraftPlan
from depthmix.depth.cascade import simulate
from depthmix.depth.confidences import Confidences
from depthmix.depth.costs import Costs

WORTHWHILE = 1.05
"""Speed-up below which a model stays dense: less is within what machines differ by from day to
day."""

MOST_FIRST_EXITS = 2
"""Exits of the plans of which all choices are tried, at most."""

MOST_EXITS = 6
"""Exits of a plan at most; each is asked about nearly every token that those below pass on."""

FIRST_THRESHOLDS = (0.95, 0.9, 0.8, 0.7, 0.5)
FIRST_JOINT_THRESHOLDS = (0.7, 0.5, 0.3, 0.0)
FIRST_MAX_DRAFTS = 12
"""What is tried with every choice of exits."""

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99)
JOINT_THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
MAX_DRAFTS = (1, 2, 3, 4, 6, 8, 10, 12, 16, 24)
"""What the best of these are refined by, one value at a time."""

NUM_REFINED = 3
"""Choices of exits that are refined."""


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What a plan does on some texts, by the model of costs."""

    speed_up: float
    """Time of dense generation over the plan's, prompts included."""

    acceptance: float
    """Share of the drafts that the top agrees with; 1 if there is none."""

    drafted: float
    """Share of the tokens that exits drafted and the top agreed with."""

    layers_per_token: float
    """Passes of layers for the mean token; dense, those are all layers."""

    rounds_per_token: float
    """Passes of the top for the mean token."""

    texts_unchanged: float
    """Share of the texts that stay the same."""

    num_texts: int
    """Texts that this was seen on."""

    num_tokens: int
    """Tokens of these texts."""


def choose_plan(recorded: Confidences, costs: Costs, *, num_hidden_layers: int) -> DraftPlan:
    """Search the plan with the best expected speed-up.

    Every choice of one or two exits is tried with a grid of common thresholds. The best are
    refined: of all changes of one value, and of all exits more or less, the best is made, until
    none helps.

    Args:
        recorded: What exits say of some texts.
        costs: Times of the model's parts.
        num_hidden_layers: Layers of the model.

    Returns:
        The plan, with the recording's vocabulary.
    """

    def rate(plans: Sequence[DraftPlan]) -> list[float]:
        found = simulate(recorded, plans, costs, num_hidden_layers=num_hidden_layers)
        return found.speed_ups().tolist()

    first = [
        DraftPlan.for_all(
            exits, threshold=threshold, joint_threshold=joint, max_drafts=FIRST_MAX_DRAFTS
        )
        for exits in list_first_choices(recorded.layers)
        for threshold in FIRST_THRESHOLDS
        for joint in FIRST_JOINT_THRESHOLDS
    ]
    rated = sorted(zip(rate(first), first, strict=True), key=lambda pair: -pair[0])
    starts: dict[tuple[int, ...], tuple[float, DraftPlan]] = {}
    for speed, plan in rated:
        starts.setdefault(plan.exits, (speed, plan))
    best_speed, best = 0.0, rated[0][1]
    for speed, plan in list(starts.values())[:NUM_REFINED]:
        while True:
            changes = list(_change_one(plan, recorded.layers))
            speeds = rate(changes)
            fastest = max(speeds)
            if fastest <= speed * (1 + 1e-6):
                break
            speed, plan = fastest, changes[speeds.index(fastest)]
        if speed > best_speed:
            best_speed, best = speed, plan
    return replace(best, vocabulary=recorded.vocabulary)


def expect(
    recorded: Confidences,
    plan: DraftPlan,
    costs: Costs,
    *,
    num_hidden_layers: int,
    verify: bool = True,
) -> Expectation:
    """Say what a plan does on texts, best on others than those that chose it.

    Args:
        recorded: What exits say of these texts.
        plan: The plan.
        costs: Times of the model's parts.
        num_hidden_layers: Layers of the model.
        verify: Let the top verify.

    Returns:
        Speed-up, acceptance and the rest.
    """
    found = simulate(recorded, [plan], costs, num_hidden_layers=num_hidden_layers, verify=verify)
    num_tokens = max(int(found.num_tokens.sum()), 1)
    num_drafted, num_accepted = int(found.num_drafted.sum()), int(found.num_accepted.sum())
    return Expectation(
        speed_up=float(found.speed_ups()[0]),
        acceptance=num_accepted / num_drafted if num_drafted else 1.0,
        drafted=num_accepted / num_tokens,
        layers_per_token=float(found.layer_runs.sum()) / num_tokens,
        rounds_per_token=int(found.num_rounds.sum()) / num_tokens,
        texts_unchanged=1 - float(found.changed.mean()),
        num_texts=len(recorded.lengths),
        num_tokens=int(recorded.lengths.sum()),
    )


def list_first_choices(layers: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """List the choices of exits of which all are tried, those of one exit first.

    Args:
        layers: Layers that have exits.
    """
    for number in range(1, min(MOST_FIRST_EXITS, len(layers)) + 1):
        yield from itertools.combinations(layers, number)


def _change_one(plan: DraftPlan, layers: Sequence[int]) -> Iterator[DraftPlan]:
    """List the plans that differ from one in one value, or in one exit more or less."""
    pairs = dict(zip(plan.exits, plan.thresholds, strict=True))
    for layer in plan.exits if len(pairs) > 1 else ():
        yield _replace_exits(plan, {exit_: pairs[exit_] for exit_ in pairs if exit_ != layer})
    if len(pairs) < MOST_EXITS:
        for layer, threshold in itertools.product(layers, FIRST_THRESHOLDS):
            if layer not in pairs:
                yield _replace_exits(plan, {**pairs, layer: threshold})
    for place, threshold in itertools.product(range(len(plan.exits)), THRESHOLDS):
        thresholds = list(plan.thresholds)
        thresholds[place] = threshold
        yield replace(plan, thresholds=tuple(thresholds))
    for joint in JOINT_THRESHOLDS:
        yield replace(plan, joint_threshold=joint)
    for most in MAX_DRAFTS:
        yield replace(plan, max_drafts=most)


def _replace_exits(plan: DraftPlan, thresholds: Mapping[int, float]) -> DraftPlan:
    """Let other exits draft, each from its own threshold."""
    exits = tuple(sorted(thresholds))
    return replace(plan, exits=exits, thresholds=tuple(thresholds[exit_] for exit_ in exits))
