"""Which plan of drafts is the fastest on recorded texts, and what it promises on others."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from depthmix.decoding.draft_plan import DraftPlan
from depthmix.depth.binomial import binomial_tail, fewest_trials, highest_share
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

UNVERIFIED_THRESHOLDS = (0.999, 0.998, 0.995, 0.99, 0.98, 0.97, 0.95, 0.925, 0.9, 0.85, 0.8, 0.7)
"""Thresholds of drafts that nothing verifies, in the order in which they are tested."""

LIKELY_THRESHOLD = 0.95
"""The one among them at which their exits are chosen."""


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
        for exits in _choose_exits(recorded.layers)
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


def _choose_exits(layers: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """List the choices of exits, those of few first."""
    for number in range(1, min(MOST_FIRST_EXITS, len(layers)) + 1):
        yield from itertools.combinations(layers, number)


def _grow(
    rate: Callable[[Sequence[tuple[int, ...]]], list[float]], layers: Sequence[int]
) -> tuple[int, ...]:
    """Take the fastest choice of few exits, and add the best further ones while they help."""
    choices, fastest, exits = list(_choose_exits(layers)), 0.0, ()
    while choices:
        speeds = rate(choices)
        if max(speeds) <= fastest:
            break
        fastest = max(speeds)
        exits = choices[speeds.index(fastest)]
        rest = [layer for layer in layers if layer not in exits and len(exits) < MOST_EXITS]
        choices = [tuple(sorted((*exits, layer))) for layer in rest]
    return exits


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
