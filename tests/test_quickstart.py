"""The quickstart at toy size, on a tiny model: what it writes and says."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from checkpoints import save_checkpoint

ROOT = Path(__file__).parents[1]


@pytest.fixture
def quickstart(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("examples.quickstart.__main__")


def run_toy(quickstart, monkeypatch, output: Path, *flags: str) -> None:
    """Run it with a tiny model in the place of the package's."""
    save_checkpoint(output / "base-model")
    command = ["quickstart", "--toy", *flags, "--output", str(output)]
    monkeypatch.setattr(sys, "argv", command)
    quickstart.main()


def read_prompts(path: Path) -> set[str]:
    return {json.loads(line)["prompt"] for line in path.read_text("utf-8").splitlines()}


@pytest.mark.slow
def test_without_a_flag_the_run_has_no_exits(quickstart, monkeypatch, tmp_path, capsys):
    run_toy(quickstart, monkeypatch, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("adapter", "base-model", "held-out.jsonl", "report.html", "train.jsonl"),
    }
    assert not (tmp_path / "adapter" / "exits").exists()
    assert "<h2>Speed" not in (tmp_path / "report.html").read_text("utf-8")
    assert capsys.readouterr().out.splitlines()[-1] == f"Report: {tmp_path / 'report.html'}"


@pytest.mark.slow
def test_compared_it_has_exits_and_says_what_they_gain(quickstart, monkeypatch, tmp_path, capsys):
    run_toy(quickstart, monkeypatch, tmp_path, "--compare")
    exits = tmp_path / "adapter" / "exits"
    about = json.loads((exits / "exits.json").read_text("utf-8"))["about"]
    assert about["training"]["num_steps"] == 2
    assert about["data"]["train"] == str(tmp_path / "train.jsonl")
    unseen = read_prompts(tmp_path / "calibration.jsonl")
    assert len(unseen) == 8
    for name in ("train.jsonl", "held-out.jsonl"):
        assert not unseen & read_prompts(tmp_path / name)
    measured = json.loads((exits / "calibration.json").read_text("utf-8"))["measured"]
    plan = json.loads((exits / "plan.json").read_text("utf-8"))
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"{measured['speed_up']:.2f} times as fast" in last
    assert last.startswith(
        "Calibration says to stay dense" if plan["stay_dense"] else "With --fast"
    )
    assert f"{measured['num_texts']} texts are the same" in last
    assert "<h2>Speed" in (tmp_path / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("stay_dense", "num_same", "said"),
    [
        (
            False,
            8,
            "With --fast it is 1.32 times as fast as without, and all 8 texts are the same.",
        ),
        (
            False,
            7,
            "With --fast it is 1.32 times as fast as without, and 7 of 8 texts are the same.",
        ),
        (
            True,
            8,
            "Calibration says to stay dense, which --fast does: drafts were 1.32 times as fast "
            "(1.01 expected), and all 8 texts are the same.",
        ),
    ],
)
def test_the_sentence_says_what_was_measured(quickstart, stay_dense, num_same, said):
    calibration = SimpleNamespace(
        measured=SimpleNamespace(speed_up=1.32, num_same=num_same, num_texts=8),
        found=SimpleNamespace(expected=SimpleNamespace(speed_up=1.01)),
        plan=SimpleNamespace(stay_dense=stay_dense),
    )
    assert quickstart.say_speed(calibration) == said
