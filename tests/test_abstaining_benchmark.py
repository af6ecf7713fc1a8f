"""The benchmark of abstaining: areas under ROC curves, and what is compared with what."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


def test_an_area_is_the_chance_that_a_right_answer_has_the_higher_score():
    from abstaining import area_under_roc

    generator = np.random.default_rng(0)
    scores, right = generator.integers(0, 4, size=40), generator.random(40) < 0.6
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[right] for b in scores[~right]]
    assert area_under_roc(scores, right) == pytest.approx(np.mean(pairs))
    assert area_under_roc(np.arange(4.0), np.array([False, False, True, True])) == 1.0
    assert area_under_roc(np.ones(4), np.array([False, True, True, True])) == 0.5
    assert np.isnan(area_under_roc(np.ones(2), np.array([True, True])))


def test_intervals_are_over_answers():
    from abstaining import bootstrap

    generator = np.random.default_rng(1)
    right = generator.random(60) < 0.7
    good, chance = right + 0.5 * generator.standard_normal(60), generator.standard_normal(60)
    low, high = bootstrap(good, right)
    assert 0.5 < low < high <= 1.0
    assert bootstrap(good, right, against=good) == [0.0, 0.0]
    low, high = bootstrap(chance, right, against=good)
    assert low < high < 0


def test_confidences_are_held_against_the_models_own_better_one():
    from abstaining import judge

    right = [True, True, False, False]
    values = {"final_mean": [0, 1, 2, 3], "final_least": [1, 0, 1, 0], "exits_mean": [3, 2, 1, 0]}
    scores = [{name: float(row[i]) for name, row in values.items()} for i in range(4)]
    found = judge(scores, right)
    assert found["ratios"] == {
        "auroc_final_mean": 0.0,
        "auroc_final_least": 0.5,
        "auroc_exits_mean": 1.0,
    }
    assert found["own"] == "final_least"
    assert found["differences"].keys() == {"final_mean", "exits_mean"}
    assert found["differences"]["exits_mean"][0] == 0.5
    assert (found["num_answers"], found["accuracy"]) == (4, 0.5)
    assert judge(scores, [True] * 4)["ratios"] == {}


def test_without_a_tuned_model_it_refuses(monkeypatch, tmp_path):
    import abstaining

    monkeypatch.setattr(sys, "argv", ["abstaining.py", "--tuned", str(tmp_path)])
    with pytest.raises(SystemExit, match="needs a tuned model, and none is here; train it once"):
        abstaining.main()


@pytest.mark.slow
def test_every_part_runs_on_a_tiny_model(tmp_path):
    output = tmp_path / "abstaining.json"
    command = [sys.executable, BENCHMARKS / "abstaining.py", "--toy", "--output", output]
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, timeout=300)
    found = json.loads(output.read_text("utf-8"))
    assert found["num_answers"] == 8
    assert found["tuned"]["exits"]["layers"] == [2, 4, 6]
