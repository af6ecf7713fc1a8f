"""A headless Chromium for pages, and how its pages are watched."""

from __future__ import annotations

import os
import shutil

import pytest

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
"""Programs that can serve; the environment variable CHROMIUM names another one."""

PATIENCE = 600_000
"""Milliseconds after which a page counts as stuck, on the slowest machine."""

CONTRASTS = """() => {
  const luminance = (color) => {
    const parts = color.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255);
    const linear = parts.map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor;
      if (!color.endsWith(", 0)")) return color;
    }
  };
  const written = ".token, td, th, p, h2, label, select, .text, .share, h4, h4 span, .where";
  return [...document.querySelectorAll(written)].map((element) => {
    const bar = element.matches("li span") && element.parentElement.querySelector("i");
    const colors = [getComputedStyle(element).color, behind(bar || element)];
    const [a, b] = colors.map(luminance);
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  });
}"""
"""Contrast of every text with what is behind it, as WCAG defines it."""


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("needs a Chromium: `apt-get install chromium-headless-shell`, or set CHROMIUM")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, timeout=PATIENCE)
        yield chromium
        chromium.close()


@pytest.fixture
def open_file(browser):
    """Give a function that opens a page; whatever the page complains about fails the test."""
    complaints, pages = [], []

    def open_path(path, **options):
        page = browser.new_page(**options)
        pages.append(page)
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda request: request.url.startswith("file:") or complaints.append(request.url),
        )
        page.goto(path.as_uri())
        return page

    yield open_path
    for page in pages:
        page.close()
    assert not complaints
