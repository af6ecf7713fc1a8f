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
        ("options", "files", "method", "loss", "adapters"),
        ("trl", "datasets", "matplotlib", "scipy", "lm_eval"),
    ),
    "statistics": ("torch", "transformers", "peft", "trl"),
    "comparison": ("torch", "transformers", "peft", "trl"),
    "figures": ("torch", "transformers", "peft", "trl"),
}
"""Libraries that a room does not import."""

OUTSIDE = ("depthmix_cli", "depthmix_replication")
"""What stands on the package, which knows nothing of it."""


def read_rule() -> list[str]:
    """The rooms, in the order of CONTRIBUTING's rule."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    rule = re.search(r"```\n(versions < [^`]+)```", text)
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
    found = {room_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__", "__main__"}
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
