"""`depthmix bench`: each way that a run can generate, by turns on the user's prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import depthmix_cli
from calibrations import make_calibrated
from depthmix import DraftPlan, bench
from depthmix.models import turns
from runs import make_runs

PLAN = {"threshold": 0.3, "joint_threshold": 0.1}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with a mixture."""
    folder = make_runs(tmp_path_factory.mktemp("bench"), {"mode": {}})
    return folder / "mode"


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "mine.txt"
    path.write_text("1 + 1 =\n\n20 + 20 =\n3 +\n", "utf-8")
    return path


def test_a_run_with_a_mixture_is_measured_in_turns(run, prompts, monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(turns.time, "perf_counter", lambda: float(next(ticks)))
    found = bench(run, prompts=prompts, max_new_tokens=4, top_k=1)
    names = ["base", "merged LoRA", "dense mixture", "Top-1, lazy", "prompt lookup of 3"]
    ways = {way.name: way for way in found.ways}
    assert list(ways) == names
    assert (found.num_prompts, found.reference) == (3, "dense mixture")
    assert found.left_out == ("fast: there are no exits; put some on by `depthmix add-exits`.",)
    dense = ways["dense mixture"]
    assert (dense.speed_up, dense.num_same, dense.layers_per_token) == (1.0, 3, 4.0)
    assert ways["prompt lookup of 3"].num_same == 3
    assert 1 <= ways["prompt lookup of 3"].layers_per_token <= 4
    assert ways["Top-1, lazy"].layers_per_token <= 4
    for way in found.ways:  # each prompt takes a second on this clock
        assert way.spread[0] <= way.tokens_per_second <= way.spread[1]
        assert way.speed_up == pytest.approx(way.num_tokens / dense.num_tokens)
        assert way.interval[0] <= way.speed_up <= way.interval[1]


def test_exits_draft_with_and_without_verification(tmp_path, prompts):
    folder = make_calibrated(tmp_path / "model")
    bare = bench(folder, prompts=prompts, max_new_tokens=4, num_prompts=1)
    assert [way.name for way in bare.ways] == ["dense", "fast, lossless", "prompt lookup of 3"]
    assert bare.ways[1].interval is None
    assert [line.partition(":")[0] for line in bare.left_out] == [
        "base and merged LoRA",
        "Top-K",
        "fast, lossless, by a plan",
        "fast, lossy",
    ]
    for name in ("plan.json", "unverified_plan.json"):
        plan = DraftPlan.for_all((1, 2), **PLAN)
        (folder / "exits" / name).write_text(json.dumps(plan.to_dict()))
    found = bench(folder, prompts=prompts, max_new_tokens=12)
    ways = {way.name: way for way in found.ways}
    assert {"fast, lossless", "fast, lossy"} <= set(ways)
    assert ways["fast, lossless"].num_same == 3
    assert 0 < ways["fast, lossless"].acceptance <= 1
    assert ways["fast, lossless"].layers_per_token < 4


def test_the_command_asks_what_the_run_was_evaluated_on(run, capsys):
    command = ["bench", str(run), "--num-prompts", "2", "--max-new-tokens", "2"]
    assert depthmix_cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "dense mixture" in printed
    assert "items.jsonl" in printed
    assert "Left out: fast" in printed


def test_what_cannot_be_measured_is_refused(run, prompts, tmp_path):
    with pytest.raises(ValueError, match=r"`top_k` must be at most \d, the routes"):
        bench(run, prompts=prompts, top_k=9)
    with pytest.raises(ValueError, match="`prompts` must name a file of prompts"):
        bench(make_calibrated(tmp_path / "model"))
    prompts.write_text("\n", "utf-8")
    with pytest.raises(ValueError, match="`prompts` must hold text to go on from"):
        bench(run, prompts=prompts)
