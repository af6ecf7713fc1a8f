"""Figures of a lens: every token, guess and colour is where the numbers say."""

from __future__ import annotations

import html
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle

import depthmix_cli
from checkpoints import save_checkpoint
from depthmix.depth.colours import RAMP, ink_on
from depthmix.depth.token_texts import visible_text
from depthmix.figures.layers import COLOURS, _show, draw_layers
from depthmix.figures.style import save_figure, to_svg
from depthmix.pages import lens_page
from test_lens import HOSTILE, hostile_lens


def varied(lens, scale=1.0):
    """Give a lens other numbers at each place, and right guesses at some."""
    size = len(lens.tokens)

    def vary(prediction, seed):
        draws = np.random.default_rng(seed).random((4, size))
        right = [(lens.tokens[t + 1],) for t in range(size - 1)] + [("?",)]
        wrong = [("no",)] * size
        return replace(
            prediction,
            top_tokens=tuple(right[t] if (t + seed) % 3 else wrong[t] for t in range(size)),
            top_probabilities=tuple((p,) for p in draws[0].tolist()),
            entropy=tuple((scale * draws[1]).tolist()),
            kl_to_final=tuple((scale * draws[2]).tolist()),
            rank=tuple((1 + 99 * draws[3]).astype(int).tolist()[1:]),
            jsd_to_ensemble=None
            if prediction.jsd_to_ensemble is None
            else tuple((0.5 * draws[2]).tolist()),
        )

    return replace(
        lens,
        layers=tuple(vary(layer, seed) for seed, layer in enumerate(lens.layers)),
        ensemble=vary(lens.ensemble, 7),
    )


def patches(axes, kind):
    found = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    if kind == "frames":
        return [patch for patch in found if not patch.get_fill()]
    cells = [patch for patch in found if patch.get_fill()]
    return [p for p in cells if (p.get_height() > 0.5) == (kind == "cells")]


def corner(patch):
    """Find the column and row that a patch is in."""
    return int(patch.get_x()), int(patch.get_y())


def share(value, high, shade):
    return math.log(value) / math.log(high) if shade == "rank" else value / high


@pytest.mark.parametrize("tokens", [None, (4, 9)])
@pytest.mark.parametrize("shade", ["probability", "entropy", "rank", "kl"])
def test_cells_have_the_colours_of_their_numbers(shade, tokens):
    lenses = {"tuned": varied(hostile_lens()), "base": varied(hostile_lens(routed=False), 2.0)}
    figure = draw_layers(lenses, shade=shade, tokens=tokens)
    size = len(HOSTILE)
    columns = list(range(1, size + 1) if tokens is None else range(3, 9))
    rows = {
        "tuned": [lenses["tuned"].ensemble, *reversed(lenses["tuned"].layers)],
        "base": [None, *reversed(lenses["base"].layers)],
    }

    def value(prediction, i):
        if shade == "rank" and i == size:
            return None
        return {
            "probability": lambda: prediction.top_probabilities[i - 1][0],
            "entropy": lambda: prediction.entropy[i - 1],
            "rank": lambda: prediction.rank[i - 1],
            "kl": lambda: prediction.kl_to_final[i - 1],
        }[shade]()

    known = [value(p, i) for row in rows.values() for p in row if p for i in columns]
    high = 1 if shade == "probability" else max(v for v in known if v is not None)
    for axes, (name, predictions) in zip(figure.axes, rows.items(), strict=False):
        expected = {
            (x, y): COLOURS(share(value(prediction, i), high, shade))
            for y, prediction in enumerate(predictions)
            for x, i in enumerate(columns)
            if prediction is not None and value(prediction, i) is not None
        }
        drawn = {corner(patch): patch.get_facecolor() for patch in patches(axes, "cells")}
        assert drawn.keys() == expected.keys()
        for place, colour in expected.items():
            np.testing.assert_allclose(drawn[place], colour, atol=0.02)
        right = {
            (x, y)
            for y, prediction in enumerate(predictions)
            for x, i in enumerate(columns)
            if prediction and i < size and prediction.top_tokens[i - 1][0] == HOSTILE[i]
        }
        assert {corner(patch) for patch in patches(axes, "frames")} == right
        assert 0 < len(right) < len(expected)
        shown = {
            tuple(map(int, text.get_position())): (text.get_text(), text.get_color())
            for text in axes.texts
        }
        for (x, y), colour in expected.items():
            guess = visible_text(predictions[y].top_tokens[columns[x] - 1][0])
            if guess.isascii():
                whole = guess if len(guess) <= 8 else f"{guess[:7]}…"
                assert shown[x, y] == (whole, ink_on(colour))
        assert axes.get_title(loc="left") == name
        weights = patches(axes, "lines")
        assert len(weights) == (3 * len(columns) if name == "tuned" else 0)
        for patch in weights:
            weight = lenses[name].routing.weights[columns[corner(patch)[0]] - 1][
                3 - corner(patch)[1]
            ]
            assert patch.get_width() == pytest.approx(0.88 * weight)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("bbbbbbbb", "bbbbbbbb"),
        ("ccccccccc", "ccccccc…"),
        ("中中中中", "中中中中"),
        ("中中中中中", "中中中…"),
    ],
)
def test_a_cell_holds_half_as_many_signs_of_double_width(text, shown):
    assert _show(text, frozenset()) == shown


def test_hidden_characters_are_written():
    assert visible_text("\u202eabc\u200b \x00") == "⟨U+202E⟩abc⟨U+200B⟩·⟨U+0000⟩"
    assert visible_text("\n\tx y", dots=False) == "↵⇥x y"
    assert visible_text(r"\xf0\x9fa") == "⟨F0 9F⟩a"
    assert visible_text("\u0301") == "◌\u0301"
    assert visible_text("🦜a", unwritable="🦜") == "⟨U+1F99C⟩a"
    assert visible_text("") == ""


@pytest.mark.parametrize("suffix", [".svg", ".png", ".pdf"])
def test_no_text_warns_or_becomes_markup(suffix, tmp_path):
    lenses = {"<i>$m$</i>\u202e": hostile_lens(), "一": hostile_lens(shift=1.0)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = save_figure(draw_layers(lenses), tmp_path / f"figure{suffix}")
        assert path.stat().st_size > 1000
    if suffix == ".svg":
        svg = path.read_text("utf-8")
        assert "<script" not in svg
        assert "<i>" not in svg
        assert "$m$" in html.unescape(svg)
        assert svg == save_figure(draw_layers(lenses), path).read_text("utf-8")


def test_deeper_colours_are_darker():
    lightness = [
        np.dot(np.array(COLOURS(x)[:3]) ** 2.2, (0.2126, 0.7152, 0.0722))
        for x in np.linspace(0, 1, 50)
    ]
    assert (np.diff(lightness) < 0).all()


def test_the_page_has_the_same_colours():
    script = Path(lens_page.__file__).with_name("lens_paint.js").read_text("utf-8")
    assert f"const LIGHT = {json.dumps(RAMP)};" in script


def test_two_lenses_stand_beside_or_below_each_other():
    lenses = {"a": hostile_lens(), "b": hostile_lens(routed=False)}
    narrow, wide = draw_layers(lenses, tokens=(2, 9)), draw_layers(lenses)
    first, second = (axes.get_position() for axes in narrow.axes[:2])
    assert (second.y0, second.y1) == (first.y0, first.y1)
    assert second.x0 > first.x1
    first, second = (axes.get_position() for axes in wide.axes[:2])
    assert second.x0 == first.x0
    assert second.y1 < first.y0


def test_one_token_has_a_figure():
    lens = hostile_lens(num_layers=1)
    single = replace(
        lens,
        tokens=lens.tokens[:1],
        layers=(replace(lens.layers[0], loss=(), rank=(), probability=()),),
        ensemble=replace(lens.ensemble, loss=(), rank=(), probability=()),
    )
    assert "next" in to_svg(draw_layers({"m": single}, shade="rank"))


def test_what_cannot_be_drawn_is_refused():
    lens = hostile_lens()
    size = len(HOSTILE)
    long = replace(lens, tokens=("a",) * 49)
    for lenses in (
        {},
        {"a": lens, "b": replace(lens, tokens=("x",))},
        dict.fromkeys("abc", lens),
    ):
        with pytest.raises(ValueError, match="`lenses` must be one or two of the same tokens"):
            draw_layers(lenses)
    for tokens in ((0, 2), (3, 2), (1, size + 1)):
        with pytest.raises(ValueError, match="`tokens` must name a first and a last token"):
            draw_layers({"m": lens}, tokens=tokens)
    with pytest.raises(ValueError, match="at most 48 in all, got 1 to 49; draw a part of it, such"):
        draw_layers({"m": long})


def test_the_command_writes_a_figure(tmp_path, capsys):
    base = save_checkpoint(tmp_path / "base")
    path = tmp_path / "new" / "lens.svg"
    command = ["lens", str(base), "One, two", "--output"]
    assert depthmix_cli.main([*command, str(path), "--tokens", "2", "4"]) == 0
    assert f"Written: {path}" in capsys.readouterr().out
    svg = path.read_text("utf-8")
    assert "probability of the guess" in svg
    assert "next" not in svg
    for output, options, message in (
        ("lens.gif", [], "`path` must end in .html for the page, or in .svg, .png, .pdf"),
        ("lens.html", ["--tokens", "2", "4"], "`tokens` choose a part of a figure"),
        ("lens.png", ["--tokens", "2", "9"], "which has 8"),
        ("lens.svg", ["--tokens", "2", "4", "--serve"], "`--serve` writes nothing"),
    ):
        assert depthmix_cli.main([*command, str(tmp_path / output), *options]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / output).exists()


def test_colours_of_ink():
    assert ink_on(to_rgba("white")) == "black"
    assert ink_on(to_rgba("#213f88")) == "white"
