"""What the report says of a run's speed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from depthmix.decoding.draft_plan import DraftPlan
from depthmix.pages.report import collect_report
from depthmix.pages.report_page import write_report
from depthmix.pages.speed_section import read_speed
from runs import make_runs

READINGS = [
    {"layer": 1, "agreement": 0.4, "confident": 0.25, "confident_agreement": None},
    {"layer": 2, "agreement": 0.812, "confident": 0.5, "confident_agreement": 0.99},
]
MEASURED = {"speed_up": 1.432, "dense_tokens_per_second": 20.0, "fast_tokens_per_second": 28.6}
MEASURED |= {"num_texts": 8, "num_same": 8, "lowest": 1.2, "highest": 1.6}
EXPECTED = {"speed_up": 1.5, "layers_per_token": 2.5, "drafted": 0.7, "acceptance": 0.955}
PLAN = DraftPlan(exits=(2,), thresholds=(0.65,))


def write_exits(run, *, plan=PLAN, expected=EXPECTED):
    folder = run / "exits"
    folder.mkdir(exist_ok=True)
    settings = {"format_version": 1, "layers": [1, 2], "rank": 4, "hidden_size": 16}
    settings |= {"num_hidden_layers": 4, "sha256": "0", "about": {"readings": READINGS}}
    found = {"found": {"expected": expected}, "measured": MEASURED}
    for name, content in (
        ("exits.json", settings),
        ("plan.json", plan.to_dict()),
        ("calibration.json", found),
    ):
        (folder / name).write_text(json.dumps(content))


def test_without_exits_or_calibration_there_is_no_section(tmp_path):
    assert read_speed(tmp_path) is None
    write_exits(tmp_path)
    (tmp_path / "exits" / "plan.json").unlink()
    assert read_speed(tmp_path) is None


def test_exits_and_speeds_are_put_into_words(tmp_path):
    write_exits(tmp_path)
    speed = read_speed(tmp_path)
    first, second = speed.rows
    assert (first.layer, first.drafts, first.threshold) == ("1", False, "-")
    assert (first.confident, first.right) == ("25.0 %", "-")
    assert (second.drafts, second.threshold, second.agreement) == (True, "0.65", "81.2 %")
    assert (second.confident, second.right) == ("50.0 %", "99.0 %")
    (name, value, note), (_, other, more) = speed.cards
    assert (name, value, other) == ("measured", "1.43 times", "1.50 times")
    assert note == "20.0 tokens/s by generate, 28.6 fast; 8 of 8 texts the same"
    assert more == "2.5 layers a token, 70.0 % of the tokens drafted, 95.5 % of the drafts right"
    assert "--fast" in speed.sentence
    write_exits(tmp_path, plan=replace(PLAN, stay_dense=True))
    assert "stay dense" in read_speed(tmp_path).sentence


def test_a_damaged_calibration_is_named(tmp_path):
    write_exits(tmp_path, expected={})
    with pytest.raises(ValueError, match=r"calibration.json cannot be read .* calibrate again"):
        read_speed(tmp_path)


def test_the_page_has_the_section(tmp_path):
    run = make_runs(tmp_path, {"mode": {}}) / "mode"
    page = write_report(collect_report(run), tmp_path / "without.html").read_text("utf-8")
    assert 'id="speed"' not in page
    write_exits(run)
    page = write_report(collect_report(run), tmp_path / "with.html").read_text("utf-8")
    assert '<a href="#speed">Speed</a>' in page
    assert "<b>1.43 times</b>" in page
    assert page.count("<section") == page.count("</section>")
    write_exits(run, expected={})
    page = write_report(collect_report(run), tmp_path / "damaged.html").read_text("utf-8")
    assert "calibration could not be read" in page
    assert "<b>1.43 times</b>" not in page
