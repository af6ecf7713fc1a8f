"""The report of a run in a headless Chromium."""

import pytest

from browser import CONTRASTS
from depthmix.pages import show_report
from runs import HOSTILE_QUESTION, judge_by, make_runs
from test_speed_section import write_exits

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    runs = make_runs(tmp_path_factory.mktemp("runs"), {"mode": {}, "lora": {"method": "lora"}})
    judge_by(runs / "mode", "before", "01000000")
    judge_by(runs / "mode", "after", "10111000")
    judge_by(runs / "lora", "after", "01110000")
    return show_report(runs / "mode")


def test_the_report_draws_and_keeps_texts_as_texts(report, open_file):
    page = open_file(report)
    assert page.locator("h2").all_inner_texts() == [
        "Verdict on records", "Wins and losses", "Token by token", "Layer by layer", "Training",
        "What was trained", "Run it again",
    ]  # fmt: skip
    prompts = page.locator(".example .prompt").all_inner_texts()
    assert HOSTILE_QUESTION in prompts[0]
    assert page.locator(".example b, .prompt i").count() == 0
    drawings = page.locator("figure svg:visible").all()
    assert drawings
    assert min(drawing.bounding_box()["width"] for drawing in drawings) > 200
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_another_text_can_be_chosen(report, open_file):
    page = open_file(report)
    menu, text = page.locator("#passage"), page.locator("#tokens")
    titles = menu.locator("option").all_inner_texts()
    assert [title.split(" ·")[0] for title in titles] == ["win 1", "win 2", "loss 3"]
    assert text.inner_text().startswith("Question: Is </script><b>bold</b>")
    page.locator("#tokens .token").nth(9).click()
    page.mouse.move(5, 5)
    menu.select_option(index=2)
    assert text.inner_text().startswith("Question: 1 + 1?")
    assert "token 26 of 26, after “Question: 1 + 1?" in page.locator("#detail .head").inner_text()
    page.locator("#tokens .token").nth(4).hover()
    assert "token 5 of" in page.locator("#detail .head").inner_text()
    headings = page.locator("#detail h4").all_inner_texts()
    assert [heading.split("\n")[0] for heading in headings] == [
        "layer 3", "layer 4", "ensemble", "layer 4",
    ]  # fmt: skip
    assert page.locator("#maps table").count() == 2
    page.keyboard.press("Tab")
    page.locator("#tokens .token.current").focus()
    page.keyboard.press("ArrowRight")
    assert "token 6 of" in page.locator("#detail .head").inner_text()


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_every_text_has_contrast(report, open_file, color_scheme):
    page = open_file(report, color_scheme=color_scheme)
    assert min(page.evaluate(CONTRASTS)) >= 4.5


def test_a_narrow_screen_shows_the_whole_table_of_exits(report, open_file):
    write_exits(report.parent)
    page = open_file(show_report(report.parent), viewport={"width": 390, "height": 800})
    table = page.locator("#speed table")
    box = table.bounding_box()
    assert box["x"] + box["width"] <= 390
    assert max(cell.bounding_box()["height"] for cell in table.locator("th").all()) < 45
    assert table.locator("tr.main th").all_inner_texts() == ["2"]


def test_a_narrow_screen_shows_all_of_it(report, open_file):
    page = open_file(report, viewport={"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    (method, *_) = page.locator(".counts td:not(.number-cell)").all()
    assert method.bounding_box()["width"] > 150
    widths = [
        box.bounding_box()["width"] for box in page.locator("#verdict figure svg:visible").all()
    ]
    assert widths == pytest.approx([330, 288], abs=1)  # one drawn for it, and one as it was drawn
