"""What README and docs let their readers type: blocks of code, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent

PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / folder / "README.md" for folder in ("benchmarks", "examples/quickstart")),
    ROOT / "replication" / "README.md",
    ROOT / "CONTRIBUTING.md",
]

SHOWN = "text"
"""What a block is marked by that is only to be looked at; a block without a mark is commands."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    """The page."""

    language: str
    """What stands behind the fence; empty for commands."""

    text: str
    """What is in it."""

    def list_commands(self) -> Iterator[list[str]]:
        """List the commands of a block without a mark, split as a shell does."""
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


def list_blocks(page: Path) -> list[Block]:
    """List the fenced blocks of a page, those in lists too."""
    fenced = re.findall(r"^( *)```([^\n]*)\n(.*?)^\1```$", page.read_text("utf-8"), re.M | re.S)
    return [Block(page, language.strip(), text) for _, language, text in fenced]


def list_inline_commands(page: Path) -> list[list[str]]:
    """List the commands of this project that stand in a page's sentences with options."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text("utf-8"), flags=re.M | re.S)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    commands = [span for span in spans if re.match(r"depthmix [a-z-]+ .*--", span)]
    return [shlex.split(command) for command in commands if "…" not in command]
