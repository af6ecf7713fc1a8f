"""The choice of a plan on recorded confidences, and what is promised of other texts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from cascades import LAYERS, NUM_LAYERS, make_costs, make_recorded
from depthmix.decoding.draft_plan import DraftPlan
from depthmix.depth.binomial import binomial_tail, fewest_trials, highest_share
from depthmix.depth.calibration import choose_plan, expect
from depthmix.depth.cascade import simulate
from depthmix.depth.confidences import Confidences
from depthmix.depth.unverified import choose_unverified

OPTIONS = {"num_hidden_layers": NUM_LAYERS}


def draw_honest(
    num_texts: int, *, length: int = 30, seed: int = 0, power: float = 4.0, flaw: float = 1.0
) -> Confidences:
    """Draw exits that are right as often as they say, the higher ones surer; or less often."""
    rng = np.random.default_rng(seed)
    shape = (len(LAYERS), num_texts, length)
    confidence = rng.random(shape) ** (1 / (power * np.arange(1, 4)[:, None, None]))
    agrees = rng.random(shape) < confidence * flaw
    return make_recorded(confidence, agrees, [length] * num_texts)


@pytest.mark.parametrize(("n", "p"), [(1, 0.02), (17, 0.3), (200, 0.02), (900, 0.5)])
def test_tails_are_scipys(n, p):
    for k in {0, 1, n // 3, n}:
        expected = stats.binom.cdf(k, n, p)
        assert binomial_tail(k, n, p) == pytest.approx(expected, rel=1e-9, abs=1e-300)
    assert binomial_tail(0, n, 0.0) == 1
    assert binomial_tail(0, n, 1.0) == 0


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (4, 250)])
def test_bounds_are_scipys(k, n):
    found = stats.binomtest(k, n).proportion_ci(confidence_level=0.9, method="exact")
    assert highest_share(k, n) == pytest.approx(found.high, abs=1e-9)


def test_no_event_must_be_seen_so_often():
    assert fewest_trials(0.02) == 149
    assert 0.98**149 <= 0.05 < 0.98**148
    assert fewest_trials(0.5, error=0.25) == 2


def test_the_plan_is_at_least_as_good_as_any_of_a_grid():
    recorded, costs = draw_honest(6), make_costs()
    plan = choose_plan(recorded, costs, **OPTIONS)
    own = expect(recorded, plan, costs, **OPTIONS)
    grid = [
        DraftPlan.for_all(exits, threshold=threshold, joint_threshold=joint, max_drafts=most)
        for number in (1, 2, 3)
        for exits in itertools.combinations(LAYERS, number)
        for threshold in (0.5, 0.7, 0.8, 0.9, 0.95)
        for joint in (0.0, 0.3, 0.5, 0.7)
        for most in (4, 12)
    ]
    speeds = simulate(recorded, grid, costs, **OPTIONS).speed_ups()
    assert own.speed_up >= speeds.max() - 1e-9 > 1
    assert plan.vocabulary == recorded.vocabulary
    assert own == expect(recorded, plan, costs, **OPTIONS)


def test_an_exit_that_says_nothing_is_left_out():
    recorded = draw_honest(6)
    recorded.confidence[0], recorded.agrees[0] = 0.1, False
    assert 2 not in choose_plan(recorded, make_costs(), **OPTIONS).exits


def test_exits_that_boast_are_expected_to_lose():
    recorded, costs = draw_honest(6), make_costs()
    recorded.confidence[:], recorded.agrees[:] = 0.999, False
    plan = choose_plan(recorded, costs, **OPTIONS)
    found = expect(recorded, plan, costs, **OPTIONS)
    assert found.speed_up < 1.05
    assert found.acceptance == 0
    assert found.drafted == 0


def test_what_is_expected_is_counted():
    recorded = make_recorded(np.ones((3, 2, 5)), np.ones((3, 2, 5)), [5, 1])
    plan = DraftPlan.for_all((2,), max_drafts=2)
    found = expect(recorded, plan, make_costs(), **OPTIONS)
    # Four tokens after the first: two drafts and the top, then the last by the top.
    assert (found.drafted, found.acceptance) == (0.5, 1.0)
    assert found.rounds_per_token == 0.5
    assert found.layers_per_token == (2 + 2 + NUM_LAYERS + NUM_LAYERS) / 4
    assert (found.num_texts, found.num_tokens, found.texts_unchanged) == (2, 6, 1.0)


class TestUnverified:
    def choose(self, tested: Confidences, texts_unchanged: float = 0.9):
        learnt = draw_honest(10, seed=7)
        options = {"texts_unchanged": texts_unchanged, **OPTIONS}
        return choose_unverified(learnt, tested, make_costs(), **options)

    def test_few_texts_promise_nothing(self):
        with pytest.raises(ValueError, match=r"0.98 needs at least 149 texts .* got 60;"):
            self.choose(draw_honest(60), 0.98)

    @pytest.mark.parametrize("share", [0.0, 1.0, 1.2])
    def test_a_share_is_a_share(self, share):
        with pytest.raises(ValueError, match="must be a share above 0 and below 1"):
            self.choose(draw_honest(60), share)

    def test_a_threshold_passes_only_with_its_bound(self):
        plan, promise = self.choose(draw_honest(200, power=30.0, flaw=1.0, seed=3), 0.7)
        assert not plan.stay_dense
        assert promise.lowest >= 0.7
        assert promise.num_tested == 200
        found = stats.binomtest(promise.num_changed, 200)
        low = 1 - found.proportion_ci(confidence_level=0.9, method="exact").high
        assert promise.lowest == pytest.approx(low)
        assert plan.vocabulary is not None

    def test_exits_that_boast_pass_nothing(self):
        plan, promise = self.choose(draw_honest(100, power=3000.0, flaw=0.9))
        assert plan.stay_dense
        assert promise.lowest < 0.9

    def test_testing_ends_at_the_first_that_fails(self):
        """A laxer threshold is not taken that would pass by itself."""
        learnt = draw_honest(10)
        learnt.confidence[:], learnt.confidence[0, :, ::2], learnt.confidence[1] = 0.0, 1.0, 1.0
        learnt.agrees[:] = True
        tested = draw_honest(100)
        # Up to 0.99 the second exit drafts, and is wrong; below it the first one, and is right.
        tested.confidence[0], tested.confidence[1] = 0.985, 0.9995
        tested.agrees[0], tested.agrees[1] = True, False
        options = {"texts_unchanged": 0.9, **OPTIONS}
        plan, promise = choose_unverified(learnt, tested, make_costs(), **options)
        assert plan.stay_dense
        assert promise.num_changed == 100
        lax = DraftPlan.for_all(LAYERS[:2], threshold=0.98)
        found = expect(tested, lax, make_costs(), verify=False, **OPTIONS)
        assert found.texts_unchanged == 1

    def test_promises_are_kept(self):
        """Of many calibrations, at most about one in twenty promises too much."""
        broken = 0
        for seed in range(40):
            plan, _ = self.choose(draw_honest(60, length=12, power=12.0, seed=seed), 0.8)
            if not plan.stay_dense:
                others = draw_honest(400, length=12, power=12.0, seed=1000 + seed)
                seen = expect(others, plan, make_costs(), verify=False, **OPTIONS)
                broken += seen.texts_unchanged < 0.8 - 0.02
        assert broken <= 4
