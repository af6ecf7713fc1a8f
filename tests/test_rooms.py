"""The rule of the house: rooms import from those before them, and some know nothing of others."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "depthmix"

UNKNOWN = {
    **dict.fromkeys(
        ("options", "libraries", "files", "method", "loss", "adapters"),
        ("trl", "datasets", "matplotlib", "scipy", "lm_eval"),
    ),
    "statistics": ("torch", "transformers", "peft", "trl"),
    "comparison": ("torch", "transformers", "peft", "trl"),
    "figures": ("torch", "transformers", "peft", "trl"),
}
"""Libraries that a room does not import."""

MOST_FLOORS = 8
"""Floors of the package: a room stands one above the highest that it imports from."""

OUTSIDE = ("depthmix_cli", "depthmix_replication")
"""What stands on the package, which knows nothing of it."""


def read_rule() -> list[str]:
    """The rooms, in the order of CONTRIBUTING's rule."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    rule = re.search(r"```text\n(options < [^`]+)```", text)
    assert rule is not None
    return re.findall(r"\w+", rule[1])


def list_files() -> list[Path]:
    """The files that lie in a room; the package's own two only hand on."""
    return [path for path in sorted(PACKAGE.rglob("*.py")) if not path.name.startswith("__")] + [
        path for path in sorted(PACKAGE.glob("*/**/__init__.py"))
    ]


def room_of(path: Path) -> str:
    """Name the folder or file at the top in which a file lies."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def list_imports(path: Path) -> Iterator[str]:
    """Name every module that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_the_rule_names_every_room_once():
    found = {room_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    rule = read_rule()
    assert sorted(rule) == sorted(found)
    table = re.findall(r"^\| `(\w+)(?:/|\.py)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    assert table == rule


@pytest.mark.parametrize("path", list_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_from_its_room_and_those_before(path):
    rule = read_rule()
    for module in list_imports(path):
        if module == "depthmix" or module.startswith("depthmix."):
            parts = module.split(".")
            assert len(parts) > 1, "the package's names are for users; import from the room"
            assert rule.index(parts[1]) <= rule.index(room_of(path)), f"imports {module}"
        unknown = (*OUTSIDE, *UNKNOWN.get(room_of(path), ()))
        assert module.partition(".")[0] not in unknown, f"imports {module}"


def test_the_house_is_low():
    """A line of rooms allows as many floors as rooms; imports that are not needed build them up."""
    uses: dict[str, set[str]] = {room: set() for room in read_rule()}
    for path in list_files():
        modules = [module.split(".") for module in list_imports(path)]
        uses[room_of(path)] |= {parts[1] for parts in modules if parts[0] == PACKAGE.name}
    floors: dict[str, int] = {}
    for room in read_rule():
        floors[room] = 1 + max((floors[other] for other in uses[room] - {room}), default=0)
    assert max(floors.values()) <= MOST_FLOORS, floors
    assert floors["method"] == 2, "options stand before it, and nothing else"


def test_the_replication_knows_no_command_line():
    for path in (ROOT / "replication" / "src").rglob("*.py"):
        assert not [name for name in list_imports(path) if name.startswith("depthmix_cli")], path
