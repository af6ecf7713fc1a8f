"""Plans of drafts: what they hold, and what they refuse."""

from __future__ import annotations

import json

import pytest

from depthmix.decoding.draft_plan import DraftPlan

PLAN = {"exits": (2, 5), "thresholds": (0.9, 0.5)}


def test_a_plan_survives_json():
    plan = DraftPlan(**PLAN, joint_threshold=0.25, max_drafts=3, vocabulary=(1, 4), stay_dense=True)
    assert DraftPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_one_threshold_serves_all():
    assert DraftPlan.for_all((1, 3), threshold=0.7).thresholds == (0.7, 0.7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exits": ()}, "`exits` must be layers in increasing order"),
        ({"exits": (5, 2)}, "`exits` must be layers in increasing order"),
        ({"thresholds": (0.9,)}, "`thresholds` must hold one for each of the 2 exits, got 1"),
        ({"thresholds": (0.9, 1.5)}, "`thresholds` must be probabilities, 0 to 1, got 1.5"),
        ({"thresholds": (0.9, float("nan"))}, "`thresholds` must be probabilities"),
        ({"joint_threshold": -1.0}, "`joint_threshold` must be probabilities"),
        ({"max_drafts": 0}, "`max_drafts` must be at least 1"),
        ({"row_costs": (1.0, 2.0)}, "`row_costs` must hold four positive numbers"),
        ({"row_costs": (1.0, 2.0, 0.0, 3.0)}, "`row_costs` must hold four positive numbers"),
        ({"vocabulary": ()}, "`vocabulary` must hold token ids"),
        ({"vocabulary": (3, 3)}, "`vocabulary` must hold token ids"),
    ],
)
def test_a_plan_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        DraftPlan(**{**PLAN, **change})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"exits": [2]}, "needs a field 'thresholds'"),
        ({**PLAN, "gamma": 4}, "has no field 'gamma'"),
        ({**PLAN, "max_drafts": "x"}, "cannot be read"),
    ],
)
def test_a_file_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        DraftPlan.from_dict(values)
