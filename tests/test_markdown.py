"""Markdown is wrapped, so that a change of a sentence shows as one."""

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


def test_what_is_prose_and_too_long():
    table, code = f"| {'a ' * 99} |", "`" + "a " * 99 + "`"
    fenced = f"```\n{'a ' * 99}\n```\n"
    assert list_prose(f"{table}\n{fenced}a b") == ["", "a b"]
    assert not can_be_wrapped(f"- {code}")
    assert not can_be_wrapped("a " * 50)
    assert can_be_wrapped(f"- {code} is code.")
