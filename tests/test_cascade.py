"""The simulated cascade: the same as a slow one that moves each position by itself."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascades import LAYERS, NUM_LAYERS, make_costs, make_recorded
from depthmix.decoding.draft_plan import DraftPlan
from depthmix.decoding.drafting import MEMORY, PRIOR
from depthmix.depth.cascade import simulate
from depthmix.depth.confidences import Confidences
from depthmix.depth.costs import Costs


def run_slowly(confidence, agrees, ended, plan: DraftPlan, costs: Costs, *, verify):
    """Move each position of one text from layer to layer, and write down what that takes."""
    edges = [0, *plan.exits, NUM_LAYERS]
    spent = {"seconds": 0.0, "drafted": 0, "accepted": 0, "rounds": 0, "runs": 0}
    spent["changed"] = False
    length, place, sure_sum, right_sum = len(confidence[0]), 1, PRIOR, PRIOR
    while place < length:  # a round
        pending = []  # each draft's layer, confidence, and whether it is right
        trust = min(right_sum / sure_sum, 1.0) if verify else 1.0
        product = trust
        while True:
            height, drafted, at_end = 0, False, False
            for low, high in itertools.pairwise(edges):
                # All that wait below this segment go through it, too.
                rows = 1 + sum(one["height"] == low for one in pending)
                for one in pending:
                    one["height"] = high if one["height"] == low else one["height"]
                height = high
                spent["seconds"] += (high - low) * float(costs.layer_seconds(rows))
                spent["runs"] += high - low
                if high == NUM_LAYERS or at_end:
                    continue
                is_last = place == length - 1
                if verify and (len(pending) == plan.max_drafts or (is_last and not ended)):
                    continue
                spent["seconds"] += costs.exit_seconds(40)
                number = plan.exits.index(high)
                sure = float(confidence[LAYERS.index(high)][place])
                enough = not verify or product * sure >= plan.joint_threshold
                if sure * trust >= plan.thresholds[number] and enough:
                    if verify and is_last:
                        at_end = True
                        continue
                    product *= sure
                    drafted = True
                    break
            if not drafted:
                break
            right = bool(agrees[LAYERS.index(height)][place])
            pending.append({"height": height, "sure": sure, "right": right})
            spent["drafted"] += 1
            place += 1
            if place == length:
                break
        if not verify:
            spent["accepted"] += sum(one["right"] for one in pending)
            spent["changed"] |= not all(one["right"] for one in pending)
        if drafted:  # the text has ended with a draft
            break
        spent["rounds"] += 1
        if not verify:
            spent["seconds"] += float(costs.head_seconds(1))
            place += 1
            continue
        assert all(one["height"] == NUM_LAYERS for one in pending)
        spent["seconds"] += float(costs.head_seconds(1 + len(pending)))
        good = [one["right"] for one in [*pending, {"right": False}]].index(False)
        spent["accepted"] += good
        for one in pending[: good + 1]:
            sure_sum = MEMORY * sure_sum + (1 - MEMORY) * PRIOR + one["sure"]
            right_sum = MEMORY * right_sum + (1 - MEMORY) * PRIOR + one["right"]
        place = place - len(pending) + good + 1
    return spent


def draw_recorded(lengths: list[int], share: float, seed: int) -> Confidences:
    """Draw confidences whose products any type holds exactly."""
    rng = np.random.default_rng(seed)
    shape = (len(LAYERS), len(lengths), max(lengths))
    confidence = rng.choice([0.0, 0.25, 0.5, 0.75, 1.0], shape)
    ended = rng.random(len(lengths)) < 0.5
    return make_recorded(confidence, rng.random(shape) < share, lengths, ended=ended)


recordings = {
    "lengths": st.lists(st.integers(1, 12), min_size=1, max_size=4),
    "share": st.floats(0, 1),
    "seed": st.integers(0, 2**20),
}


LEVELS = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])

plans = st.fixed_dictionaries(
    {
        "thresholds": st.dictionaries(st.sampled_from(LAYERS), LEVELS, min_size=1),
        "joint_threshold": st.sampled_from([0.0, 0.125, 0.5, 1.0]),
        "max_drafts": st.integers(1, 6),
    }
)


def make_plan(thresholds, **options) -> DraftPlan:
    exits = tuple(sorted(thresholds))
    return DraftPlan(exits=exits, thresholds=tuple(thresholds[i] for i in exits), **options)


@given(**recordings, tried=st.lists(plans, min_size=1, max_size=4), verify=st.booleans())
def test_all_at_once_is_one_by_one(lengths, share, seed, tried, verify):
    recorded, costs = draw_recorded(lengths, share, seed), make_costs()
    tried = [make_plan(**options) for options in tried]
    found = simulate(recorded, tried, costs, num_hidden_layers=NUM_LAYERS, verify=verify)
    for number, plan in enumerate(tried):
        for text, length in enumerate(recorded.lengths):
            own = (
                recorded.confidence[:, text, :length],
                recorded.agrees[:, text, :length],
                recorded.ended[text],
            )
            slow = run_slowly(*own, plan, costs, verify=verify)
            at = (number, text)
            expected = slow["seconds"] + (length - 1) * costs.step
            assert found.seconds[at] == pytest.approx(expected)
            assert found.num_drafted[at] == slow["drafted"]
            assert found.num_accepted[at] == slow["accepted"]
            assert found.num_rounds[at] == slow["rounds"]
            assert found.layer_runs[at] == slow["runs"]
            assert found.changed[at] == slow["changed"]


@given(**recordings)
def test_nothing_drafted_is_the_dense_model_with_its_exits(lengths, share, seed):
    recorded = draw_recorded(lengths, share, seed)
    plan = DraftPlan.for_all((3,), threshold=1.0, joint_threshold=1.0)
    recorded.confidence[recorded.confidence == 1] = 0.75
    costs = make_costs()
    found = simulate(recorded, [plan], costs, num_hidden_layers=NUM_LAYERS)
    asks = np.maximum(recorded.lengths - 2 + recorded.ended, 0) * (recorded.lengths > 1)
    asked = asks * costs.exit_seconds(40)
    assert np.allclose(found.seconds[0], found.dense_seconds + asked)
    assert (found.num_rounds[0] == recorded.lengths - 1).all()
    assert (found.layer_runs[0] == NUM_LAYERS * (recorded.lengths - 1)).all()


def test_drafts_that_are_all_right_are_counted_by_hand():
    costs = make_costs()
    recorded = make_recorded(np.ones((3, 1, 4)), np.ones((3, 1, 4)), [4])
    plan = DraftPlan.for_all((2,), joint_threshold=0.5)
    found = simulate(recorded, [plan], costs, num_hidden_layers=NUM_LAYERS)
    # Two drafts of two layers, then the last token: two layers alone, and six with the drafts.
    layers = 2 + 2 + 2 + 6 * (1.5 + 2.0) / 2
    exits = 2 * costs.exit_seconds(40)
    assert found.seconds[0, 0] == pytest.approx(layers + exits + (9.0 + 14.0) / 2 + 3 * 0.5)
    assert found.dense_seconds[0] == 3 * (8 + 7 + 0.5)
    assert found.speed_ups()[0] == pytest.approx((3 + 46.5) / (3 + found.seconds[0, 0]))
    assert (found.num_drafted[0, 0], found.num_accepted[0, 0], found.num_rounds[0, 0]) == (2, 2, 1)


def test_a_wrong_draft_throws_away_what_follows():
    agrees = np.ones((3, 1, 6))
    agrees[:, 0, 2] = 0
    recorded = make_recorded(np.ones((3, 1, 6)), agrees, [6])
    plan = DraftPlan.for_all((2,), max_drafts=3)
    found = simulate(recorded, [plan], make_costs(), num_hidden_layers=NUM_LAYERS)
    # 1, 2 and 3 are drafted, 2 is wrong; then 3 and 4; 5 is the last.
    assert found.num_drafted[0, 0] == 5
    assert found.num_accepted[0, 0] == 3
    assert found.num_rounds[0, 0] == 2
    assert not found.changed.any()
    kept = simulate(recorded, [plan], make_costs(), num_hidden_layers=NUM_LAYERS, verify=False)
    assert kept.changed.all()
    assert (kept.num_drafted[0, 0], kept.num_accepted[0, 0]) == (5, 4)


def test_a_text_of_one_token_costs_its_prompt_alone():
    recorded = make_recorded(np.ones((3, 1, 1)), np.ones((3, 1, 1)), [1])
    plan = DraftPlan.for_all((2,))
    found = simulate(recorded, [plan], make_costs(), num_hidden_layers=NUM_LAYERS)
    assert found.seconds[0, 0] == 0
    assert found.speed_ups()[0] == 1
