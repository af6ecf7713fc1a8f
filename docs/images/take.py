"""Takes the pictures of pages in these docs, in a headless Chromium: `python docs/images/take.py`.

The pages are those that docs/report.md and docs/lens.md write: the report of `runs/arc/mode`, and
`lens.html` beside it. The environment variable CHROMIUM names another browser.
"""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

FOLDER = Path(__file__).parent
REPORT, LENS = Path("runs/arc/mode/report.html"), Path("runs/arc/lens.html")
PICTURES = ("report.png", "report-tokens.png", "lens.png")
WIDTH = 1240


def take_report(page: Page) -> None:
    """Take the verdict, and one of the losses token by token."""
    page.goto(REPORT.resolve().as_uri())
    bottom = page.locator("#verdict").bounding_box()
    assert bottom is not None
    clip = {"x": 0, "y": 0, "width": WIDTH, "height": bottom["y"] + bottom["height"] + 24}
    page.screenshot(path=FOLDER / "report.png", clip=clip, full_page=True)
    menu = page.locator("#passage")
    menu.select_option(index=menu.locator("option").count() - 1)
    page.locator("#quantity").select_option("depth")
    page.locator("#tokens .token").nth(-3).click()
    page.mouse.move(2, 2)
    take_between(page, "tokens-title", "training", "report-tokens.png")


def take_between(page: Page, first: str, last: str, name: str) -> None:
    """Take what stands from one heading to the section after it."""
    page.evaluate("scrollTo(0, 0)")  # boxes are measured from the top of the window
    top = page.locator(f"#{first}").bounding_box()
    bottom = page.locator(f"#{last}").bounding_box()
    assert top is not None
    assert bottom is not None
    height = bottom["y"] - top["y"]
    clip = {"x": 0, "y": top["y"] - 24, "width": WIDTH, "height": height}
    page.screenshot(path=FOLDER / name, clip=clip, full_page=True)


def take_lens(page: Page) -> None:
    """Take the top of the lens, at the token that the text asks for."""
    page.goto(LENS.resolve().as_uri())
    page.locator("#tokens .token").nth(5).click()
    page.locator("#maps td").nth(4).hover()
    clip = {"x": 0, "y": 0, "width": WIDTH, "height": 1640}
    page.screenshot(path=FOLDER / "lens.png", clip=clip, full_page=True)


def main() -> None:
    """Take all of them."""
    with sync_playwright() as playwright:
        program = os.environ.get("CHROMIUM", "/usr/bin/chromium-headless-shell")
        browser = playwright.chromium.launch(executable_path=program)
        for take in (take_report, take_lens):
            page = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme="light")
            take(page)
        browser.close()
    for name in PICTURES:  # flat colours: 256 of them make files a third as large
        path = FOLDER / name
        Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    main()
