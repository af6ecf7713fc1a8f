"""Markdown is wrapped, so that a changed sentence shows as one, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WIDTH = 100

WRITTEN = "replication/results"
"""Pages that `depthmix reproduce` writes."""

PAGES = [
    path
    for folder in ("", "docs", "examples", "findings", "replication", "benchmarks")
    for path in sorted((ROOT / folder).glob("*.md" if folder in ("", "docs") else "**/*.md"))
    if WRITTEN not in path.as_posix()
]


LENGTH_OF_ANSWER = 3
"""Lines in which a page of the docs says what it is about to explain."""


def list_prose(text: str) -> list[str]:
    """The lines of a page that are neither code, nor tables, headings, pictures or HTML.

    What benchmarks and examples write between their marks is left out, too.
    """
    text = re.sub(r"^<!-- begin .*?^<!-- end [^\n]*", "", text, flags=re.M | re.S)
    text = re.sub(r"^ *(```|~~~).*?^ *\1$", "", text, flags=re.M | re.S)
    text = re.sub(r"^ *\$\$.*?\$\$ *$", "", text, flags=re.M | re.S)
    return [line for line in text.split("\n") if not re.match(r" *([|#<>]|!\[|\[[^]]+\]:)", line)]


def can_be_wrapped(line: str) -> bool:
    """Tell whether a line is too long and has a blank in it, outside code and a list's mark."""
    text = re.sub(r"^ *([-*+]|\d+\.)? *", "", line)
    return len(line) > WIDTH and " " in re.sub(r"`[^`]*`", "", text).strip()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_prose_is_wrapped(path):
    lines = list_prose(path.read_text("utf-8"))
    assert lines
    assert [line for line in lines if can_be_wrapped(line)] == []


def list_links(text: str) -> list[str]:
    """The links and pictures of a page that lead to files or headings of this repository."""
    text = re.sub(r"^ *(```|~~~).*?^ *\1$", "", text, flags=re.M | re.S)
    links = re.findall(r"\]\(([^()\s]+)\)", re.sub(r"`[^`\n]*`", "", text))
    return [link for link in links if not re.match(r"[a-z]+:", link)]


def list_anchors(text: str) -> set[str]:
    """The headings of a page as links name them."""
    text = re.sub(r"^ *(```|~~~).*?^ *\1$", "", text, flags=re.M | re.S)
    headings = re.findall(r"^#+ +(.*?) *$", text, re.M)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    dead = []
    for link in list_links(path.read_text("utf-8")):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        known = target.exists() and (
            not anchor or anchor in list_anchors(target.read_text("utf-8"))
        )
        dead += [] if known else [link]
    assert dead == []


def test_what_a_link_is():
    text = "[a](b.md#c), [out](https://x.y), `[no](d.md)`\n```\n[e](f.md)\n```\n![g](h.png)"
    assert list_links(text) == ["b.md#c", "h.png"]
    assert list_anchors("# LoRA_¬K, *K*: a-b\n```\n# no\n```\n") == {"lora_k-k-a-b"}


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_a_page_begins_with_its_answer(path):
    title, empty, *rest = path.read_text("utf-8").split("\n")
    assert title.startswith("# ")
    assert empty == ""
    answer = rest[: rest.index("")]
    assert 1 <= len(answer) <= LENGTH_OF_ANSWER
    assert answer[-1].endswith((".", ":", "?", ".)")), answer


def test_what_is_prose_and_too_long():
    table, code = f"| {'a ' * 99} |", "`" + "a " * 99 + "`"
    fenced = f"```\n{'a ' * 99}\n```\n"
    assert list_prose(f"{table}\n{fenced}a b") == ["", "a b"]
    assert not can_be_wrapped(f"- {code}")
    assert not can_be_wrapped("a " * 50)
    assert can_be_wrapped(f"- {code} is code.")
