"""The lens page in a headless Chromium: it draws, answers to mouse and keys, and takes no harm."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from browser import CONTRASTS
from depthmix.depth.lens_drafts import Drafts
from depthmix.pages.lens_page import write_lens
from test_lens import HOSTILE, hostile_lens

pytestmark = pytest.mark.browser

MARKUP = [text for text in HOSTILE if set(text) & set("<>\"'&")]
"""Texts that would be markup, or end an attribute."""


@pytest.fixture
def open_page(open_file, tmp_path):
    """Give a function that opens a page of lenses."""

    def open_lenses(lenses, **options):
        return open_file(write_lens(lenses, tmp_path / "lens.html"), **options)

    return open_lenses


def background(locator):
    return locator.evaluate("element => getComputedStyle(element).backgroundColor")


def test_hostile_texts_are_only_text(open_page):
    page = open_page({"<i>m</i>": hostile_lens(), "</script>": hostile_lens(routed=False)})
    tokens = page.locator("#tokens .token")
    assert tokens.count() == len(HOSTILE) + 1
    shown = tokens.all_inner_texts()
    for harmless in (*MARKUP, "{{ harm }}", "אב", "🦜"):
        assert harmless in shown
    for text, code in (("\u202eabc", "U+202Eabc"), ("\u200b", "U+200B"), ("\x00", "U+0000")):
        assert shown[HOSTILE.index(text)] == code
    assert shown[HOSTILE.index("\n")] == "↵"
    assert shown[HOSTILE.index("\\xf0")] == "F0"
    for i in range(tokens.count()):
        tokens.nth(i).click()
    assert page.evaluate("window.harm") is None
    assert page.locator("script").count() == 2
    assert page.locator("img").count() == 0
    labels = [tokens.nth(i).get_attribute("aria-label") for i in range(tokens.count() - 1)]
    assert all(label.startswith(text) for label, text in zip(labels, HOSTILE, strict=True))
    assert page.locator("#detail h3").first.inner_text().startswith("<i>m</i>")
    width = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert width <= 0  # long tokens do not widen the page


def test_hover_shows_a_token_and_leaving_it_the_pinned_one(open_page):
    page = open_page({"m": hostile_lens()})
    where = page.locator("#detail .head")
    assert "token 2 of" in where.inner_text()
    page.locator("#tokens .token").nth(4).hover()
    assert "token 5 of" in where.inner_text()
    cards = page.locator("#detail .readout")
    assert cards.locator("h4").all_inner_texts() == [
        "layer 1\nweight 25 %", "layer 2\nweight 25 %", "layer 3\nweight 50 %", "ensemble",
    ]  # fmt: skip
    assert cards.first.locator("li").count() == 5
    assert "50 %" in cards.first.locator("li").first.inner_text()
    assert cards.first.locator("li.true").inner_text().startswith(HOSTILE[4])
    assert "mean depth 2.06" in page.locator("#detail h3").inner_text()
    page.mouse.move(5, 5)
    assert "token 2 of" in where.inner_text()
    page.locator("#tokens .token").last.click()
    assert "what comes after the text" in where.inner_text()


def test_a_tap_shows_a_token_and_a_cell(open_page):
    page = open_page({"m": hostile_lens()}, has_touch=True)
    page.locator("#tokens .token").nth(4).tap()
    assert "token 5 of" in page.locator("#detail .head").inner_text()
    assert page.locator("#detail .readout").count() == 4
    page.locator("tbody tr").nth(1).locator("td").nth(2).tap()
    assert page.locator("#cell").inner_text().startswith("layer 3, in place of")


def test_hover_describes_a_cell(open_page):
    page = open_page({"m": hostile_lens()})
    page.locator("tbody tr").nth(1).locator("td").nth(1).hover()
    cell = page.locator("#cell")
    assert cell.inner_text().startswith(f"layer 3, in place of {HOSTILE[2]}")
    assert cell.locator("li").count() == 5
    assert "KL to the final layer" in cell.inner_text()
    assert page.locator("#maps th.current").inner_text() == HOSTILE[2]


def test_weights_of_layers_that_are_not_read_out_are_told(open_page):
    lens = hostile_lens()
    page = open_page({"m": replace(lens, layers=lens.layers[:1])})
    assert page.locator("#detail h4").first.inner_text() == "layer 1\nweight 25 %"
    assert "weights: layer 2 25 %, layer 3 50 %" in page.locator("#detail h3").inner_text()


def test_arrow_keys_walk_over_tokens_and_cells(open_page):
    page = open_page({"m": hostile_lens()})
    where = page.locator("#detail .head")
    page.locator("#baseline").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert "token 3 of" in where.inner_text()
    page.keyboard.press("Home")
    assert "token 1 of" in where.inner_text()
    assert "not predicted" in page.locator("#detail").inner_text()
    page.keyboard.press("ArrowDown")
    below = page.evaluate("Number(document.activeElement.dataset.i)")
    assert below > 1
    page.keyboard.press("ArrowUp")
    assert page.evaluate("Number(document.activeElement.dataset.i)") < below
    page.locator("td").first.focus()
    assert page.locator("#cell").inner_text().startswith("ensemble, in place of")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert page.locator("#cell").inner_text().startswith("layer 3, in place of <!--")
    assert page.locator("td[tabindex='0']").count() == 1


def test_menus_colour_by_every_quantity(open_page):
    page = open_page({"a": hostile_lens(), "b": hostile_lens(shift=1.0)}, color_scheme="dark")
    legend, third = page.locator("#tokens-legend"), page.locator("#tokens .token").nth(3)
    colors = set()
    for quantity, *told in (
        ("loss", "0.00", "10.00", "nats"),
        ("entropy", "0.00", "1.00", "nats"),
        ("jsd", "0.00", "0.13", "nats"),
        ("depth", "2.00", "2.42", "layers"),
        ("routing", "0.00", "0.90", "nats"),
    ):
        page.locator("#quantity").select_option(quantity)
        assert legend.inner_text().split() == told
        colors.add(background(third))
    assert len(colors) >= 3
    page.locator("#quantity").select_option("loss")
    page.locator("#baseline").select_option(label="ensemble · b")
    assert legend.inner_text().split() == ["\N{MINUS SIGN}1.00", "+1.00", "nats"]
    assert "loss \N{MINUS SIGN}1.00" in third.get_attribute("aria-label")
    third.hover()
    own, other, difference = re.findall(r"\d+\.\d\d", page.locator(".difference").inner_text())
    assert (float(own) - float(other), difference) == (pytest.approx(-1), "1.00")
    page.locator("#baseline").select_option("")
    assert page.locator(".difference").count() == 0
    assert page.locator(".map").count() == 2
    cell = page.locator("td").nth(5)
    seen = set()
    for shade in ("probability", "entropy", "rank", "kl"):
        page.locator("#shade").select_option(shade)
        seen.add(page.locator("#maps-legend").inner_text() + background(cell))
    assert len(seen) == 4


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_every_text_has_contrast(open_page, color_scheme):
    page = open_page({"m": hostile_lens()}, color_scheme=color_scheme)
    ratios = page.evaluate(CONTRASTS)
    assert len(ratios) > 100
    assert min(ratios) >= 4.5


def test_a_long_text_on_a_narrow_screen_turns_its_pages(open_page):
    lens = hostile_lens()
    long = type(lens)(
        tokens=("word", " and ") * 60,
        layers=tuple(stretched(layer, 120) for layer in lens.layers),
        ensemble=stretched(lens.ensemble, 120),
        routing=None,
    )
    page = open_page({"m": long}, viewport={"width": 390, "height": 800})
    assert page.locator("td").count() == 3 * 48
    assert page.locator("#range").inner_text() == "tokens 2 to 49 of 120"
    page.locator("#later").click()
    assert page.locator("#range").inner_text() == "tokens 50 to 97 of 120"
    page.locator("#tokens .token").last.click()
    assert page.locator("#range").inner_text() == "tokens 74 to 120 of 120"
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def stretched(prediction, num_tokens):
    """Repeat the first token's prediction."""
    return type(prediction)(
        readout=prediction.readout,
        jsd_to_ensemble=None,
        **{
            name: getattr(prediction, name)[:1] * (num_tokens - is_true)
            for names, is_true in (
                (("top_tokens", "top_probabilities", "entropy", "kl_to_final"), 0),
                (("loss", "probability", "rank"), 1),
            )
            for name in names
        },
    )


def test_what_exits_draft_is_said_beside_a_token(open_page):
    lens = hostile_lens()
    length = len(lens.tokens)
    drafts = Drafts(
        layers=(3, None, 2, *[None] * (length - 3)),
        tokens=("<b>", "", "six", *[""] * (length - 3)),
        accepted=(True, False, False, *[False] * (length - 3)),
    )
    page = open_page({"m": replace(lens, drafts=drafts)})
    said = page.locator("#detail .draft")
    for place, expected in (
        (1, "Layer 3 drafts “<b>”, which the model accepts."),
        (2, "No exit is sure: the model goes to the top."),
        (3, "Layer 2 drafts “six”, which the model refuses."),
    ):
        page.locator("#tokens .token").nth(place).click()
        assert said.inner_text() == expected
    assert page.locator("#detail b b").count() == 0
