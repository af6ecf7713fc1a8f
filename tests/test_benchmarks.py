"""The page of measurements says what the results say."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_the_page_is_written_from_the_results(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import report

    page = report.PAGE.read_text("utf-8")
    assert report.render(page) == page


def test_parts_come_from_full_runs(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import report

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "loss.json").write_text('{"size": "toy"}')
    with pytest.raises(SystemExit, match="is of a toy run"):
        report.render(report.PAGE.read_text("utf-8"))


def test_what_was_not_measured_says_so(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import report

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    page = report.render(report.PAGE.read_text("utf-8"))
    assert page.count("Not measured yet: `python benchmarks/decode.py`.") == 2
    assert report.render(page) == page
