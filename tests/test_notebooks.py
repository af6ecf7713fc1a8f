"""What a notebook shows of the library's objects."""

from __future__ import annotations

import html
import re

import numpy as np
import pytest

import depthmix
from checkpoints import make_model, make_tokenizer
from depthmix.comparison.comparison import compare
from depthmix.pages import collect_report
from evaluation_folder import write_evaluation
from runs import make_runs


@pytest.fixture(scope="module")
def model():
    return make_model(make_tokenizer())


def read_cells(shown: str) -> list[list[str]]:
    """The cells of a table, row by row."""
    rows = re.findall(r"<tr>(.*?)</tr>", shown, re.DOTALL)
    return [[html.unescape(cell) for cell in re.findall(r">([^<]*)</t[hd]>", r)] for r in rows]


def test_a_ledger_and_a_probe_are_their_tables(model):
    ledger = depthmix.parameter_ledger(model)
    assert read_cells(ledger._repr_html_()) == [list(row) for row in ledger.rows]
    probe = depthmix.probe_layers(model, [{"input_ids": [1, 2, 3, 4]}])
    shown = probe._repr_html_()
    assert read_cells(shown) == [list(row) for row in probe.rows]
    assert "4 sequences" not in shown
    assert "3 tokens of 1 sequences" in shown
    assert str(probe).splitlines()[1].split()[0] == "1"


def test_a_lens_has_the_guesses_of_each_layer(model):
    lens = depthmix.look(model, "<b>one</b>", tokenizer=make_tokenizer(), layers=[2, 4])
    shown = lens._repr_html_()
    header, *rows = read_cells(shown)
    assert header == ["layer", *lens.tokens[1:], "next"]
    assert [row[0] for row in rows] == ["4", "2"]
    assert rows[0][1:] == [guesses[0] for guesses in lens.layers[1].top_tokens]
    assert "<b>" not in shown


def test_a_comparison_is_its_table_and_notes(tmp_path):
    scores = np.repeat([1, 0], [3, 5])
    folders = [
        write_evaluation(tmp_path / name, {"arc": scores}, method=f"{name} <i>")
        for name in ("one", "two")
    ]
    shown = compare(folders)._repr_html_()
    assert [row[2] for row in read_cells(shown)] == ["method", "one <i>", "two <i>"]
    assert "McNemar" in shown
    assert "<i>" not in shown


def test_a_report_is_its_page_in_a_frame(tmp_path):
    runs = make_runs(tmp_path, {"mode": {"evaluation": None}})
    shown = collect_report(runs / "mode", title='A "run"')._repr_html_()
    (page,) = re.findall(r'^<iframe srcdoc="([^"]*)"', shown)
    assert html.unescape(page).startswith("<!doctype html>")
    assert "A &#34;run&#34;</h1>" in html.unescape(page)
