"""The share of a gap that a method recovers: against a slow loop, at the edges, and in tables."""

import json
import re

import numpy as np
import pytest

from depthmix.comparison.comparison import compare
from depthmix.comparison.recovery import Gap, recover_gap
from depthmix.comparison.tables import to_json, to_latex, to_markdown, to_text
from depthmix.statistics.resampling import NUM_RESAMPLES
from evaluation_folder import write_evaluation

GAP = Gap(start="below", goal="all", method="mode")
SHARES = {"below": 0.3, "all": 0.7, "mode": 0.55}


def draw_scores(*, shares=SHARES, num_items=120):
    """Draw right and wrong answers of three methods, with their seeds, on items of two tasks."""
    rng = np.random.default_rng(0)
    hard = {"arc": rng.random(num_items) - 0.5, "boolq": rng.random(num_items // 2) - 0.5}
    return {
        name: {
            task: (rng.random((seeds, len(items))) < shares[name] + 0.4 * items).astype(float)
            for task, items in hard.items()
        }
        for name, seeds in (("below", 3), ("all", 2), ("mode", 3))
    }


def write(folder, scores):
    runs = []
    for name, tasks in scores.items():
        for seed in range(len(tasks["arc"])):
            own = {task: table[seed].astype(int) for task, table in tasks.items()}
            place = folder / f"{name}-{seed}"
            runs.append(write_evaluation(place, own, method=name, seed=seed))
    return runs


def loop(scores, *, num_resamples):
    """Draw seeds of each method, one fewer than there are, and items of each task."""
    rng = np.random.default_rng(1)
    found = {"arc": [], "boolq": [], "average": []}
    for _ in range(num_resamples):
        seeds = {
            name: rng.integers(len(tasks["arc"]), size=len(tasks["arc"]) - 1)
            for name, tasks in scores.items()
        }
        means = {}
        for task in ("arc", "boolq"):
            num_items = scores["below"][task].shape[1]
            items = rng.integers(num_items, size=num_items)
            means[task] = {
                name: tasks[task][np.ix_(seeds[name], items)].mean()
                for name, tasks in scores.items()
            }
        means["average"] = {n: np.mean([means[t][n] for t in ("arc", "boolq")]) for n in scores}
        for task, mean in means.items():
            found[task].append((mean["mode"] - mean["below"]) / (mean["all"] - mean["below"]))
    return found


def test_shares_equal_a_slow_loop_over_resamples(tmp_path):
    scores = draw_scores()
    comparison = compare(write(tmp_path, scores), gaps=[GAP])
    expected = loop(scores, num_resamples=3000)
    assert [one.task for one in comparison.recoveries] == ["arc", "boolq", "average"]
    for one, row in zip(comparison.recoveries, comparison.rows, strict=True):
        below, goal, mode = (score.mean for score in row.scores)
        assert one.share == pytest.approx((mode - below) / (goal - below))
        assert one.undefined is None
        ends = (one.share_interval.low, one.share_interval.high)
        assert ends == pytest.approx(np.quantile(expected[one.task], [0.025, 0.975]), abs=0.05)
        assert ends[0] < one.share < ends[1]
        # The gap is the comparison's own difference.
        assert one.width == pytest.approx(row.scores[1].difference.estimate)
        widths = (one.width_interval.low, one.width_interval.high)
        difference = row.scores[1].difference.interval
        assert widths == pytest.approx((difference.low, difference.high))
    without = compare(write(tmp_path / "again", scores))
    assert [row.scores for row in without.rows] == [row.scores for row in comparison.rows]
    assert without.recoveries == ()


def test_a_gap_that_may_be_none_has_no_share(tmp_path):
    scores = draw_scores(shares=SHARES | {"all": 0.32})
    comparison = compare(write(tmp_path, scores), gaps=[GAP])
    one = comparison.recoveries[-1]
    assert one.width_interval.low <= 0 <= one.width_interval.high
    assert (one.share, one.share_interval) == (None, None)
    assert one.undefined == "the gap's interval holds 0"
    assert re.search(r"average +[+-]\S+ \(.*\) +undefined: the gap's interval", to_text(comparison))


def recover(widths, gains, *, width=None):
    """Recover a gap with given resamples; the start is at 0."""
    means = {"below": 0.0, "all": widths.mean() if width is None else width, "mode": gains.mean()}
    resampled = {"below": np.zeros_like(widths), "all": widths, "mode": gains}
    return recover_gap(GAP, task="arc", means=means, resampled=resampled, num_items=50)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("num_gone", [0, 100, 250])
def test_resamples_without_a_gap_count_on_both_sides(num_gone, sign):
    rng = np.random.default_rng(2)
    widths = sign * (0.2 + 0.02 * rng.standard_normal(NUM_RESAMPLES))
    gains = 0.5 * widths + 0.01 * rng.standard_normal(NUM_RESAMPLES)
    widths[:num_gone] = -sign * np.linspace(0, 1e-4, num_gone)
    one = recover(widths, gains)
    shares = sorted(
        gain / width for gain, width in zip(gains, widths, strict=True) if sign * width > 0
    )
    assert len(shares) >= NUM_RESAMPLES - num_gone
    # 250 of 9,999 lie on each side; those without a gap are among them.
    assert one.share_interval.low == shares[250 - num_gone]
    assert one.share_interval.high == shares[-1 - 250 + num_gone]
    assert one.share == pytest.approx(gains.mean() / widths.mean())


def test_one_more_resample_without_a_gap_and_it_is_undefined():
    widths = 0.2 + 0.02 * np.random.default_rng(3).standard_normal(NUM_RESAMPLES)
    widths[:251] = -0.1
    assert recover(widths, widths / 2).undefined == "the gap's interval holds 0"


def test_items_that_are_all_alike_promise_nothing():
    widths = np.full(NUM_RESAMPLES, 0.9)
    one = recover(widths, widths / 2)
    assert one.width_interval.low > 0
    assert one.undefined == "all resamples give the same share"


def test_a_gap_is_between_methods_that_are_there(tmp_path):
    runs = write(tmp_path, draw_scores())
    with pytest.raises(ValueError, match="`gaps` must name methods of the runs, and none"):
        compare(runs, gaps=[Gap(start="below", goal="none", method="mode")])


def test_every_form_of_table_has_the_share(tmp_path):
    comparison = compare(write(tmp_path, draw_scores()), gaps=[GAP])
    one = comparison.recoveries[0]
    ends = f"{100 * one.share_interval.low:.1f} to {100 * one.share_interval.high:.1f}"
    cell = f"{100 * one.share:.1f} ({ends})"
    for write_table in (to_text, to_markdown, to_latex):
        text = write_table(comparison)
        assert cell in text
        assert "below to all" in text
        assert "counts on both sides" in text
    saved = json.loads(to_json(comparison))["recoveries"]
    assert [entry["share"] for entry in saved] == [r.share for r in comparison.recoveries]
    assert "recovered" not in to_text(compare(write(tmp_path / "again", draw_scores())))
