"""What users see: public names, the README, committed configurations."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

import depthmix
from depthmix.run_config import load_run_config

ROOT = Path(__file__).parent.parent


def test_public_names_are_sorted_and_documented():
    assert depthmix.__all__ == sorted(depthmix.__all__)
    text = "".join(path.read_text("utf-8") for path in (ROOT / "docs").glob("*.md"))
    text += (ROOT / "README.md").read_text("utf-8")
    for name in depthmix.__all__:
        assert getattr(depthmix, name).__doc__, name
        assert name in text, f"`{name}` is nowhere in README or docs"


def test_the_readmes_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/**/*.toml")), ids=str)
def test_committed_configurations_are_read(path):
    assert load_run_config(path).model.name


def test_the_changelog_begins_with_this_version():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    assert newest is not None
    assert f'version = "{newest[1]}"' in project


def test_the_readmes_table_is_what_its_command_prints():
    readme = (ROOT / "README.md").read_text("utf-8")
    command = re.search(r"`python (examples/arc_easy/table.py) (\S+)/\{(\S+),\*\}`", readme)
    assert command is not None
    script, folder, first = command.groups()
    found = [ROOT / folder / first, *sorted((ROOT / folder).glob("*"))]  # as a shell expands it
    arguments = [sys.executable, ROOT / script, *found]
    text = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    printed = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    shown = re.findall(r"^\| [^|]+ \| ([\d,-]+) \| ([^|]+) \| ([\d.]+) \|$", readme, re.MULTILINE)
    assert len(shown) == len(printed) - 2 == 7
    assert {tuple(row) for row in shown} == {(row[1], row[2], row[5]) for row in printed[2:]}


def list_modules():
    """The table in CONTRIBUTING: patterns of the package's files, in the order of the rows."""
    folder, patterns = "", []
    for line in (ROOT / "CONTRIBUTING.md").read_text("utf-8").splitlines():
        names = re.findall(r"`([^`]+)`", line.split("|")[1]) if line.startswith("| ") else []
        if not line.startswith("| …"):
            folder = names[0] if len(names) == 1 and names[0].endswith("/") else ""
        patterns += [folder if name == folder else folder + name for name in names]
    return patterns


def test_no_file_imports_from_a_later_one():
    package, patterns = ROOT / "src" / "depthmix", list_modules()

    def place(path):
        """Row of a file; what stands for its package as a whole goes by the folder."""
        name = path.relative_to(package).as_posix()
        own = [i for i, p in enumerate(patterns) if fnmatch(name, p)]
        parents = [i for i, p in enumerate(patterns) if p.endswith("/") and name.startswith(p)]
        return (own or parents[-1:] or [None])[0]

    for path in sorted(package.rglob("*.py")):
        if path.name in ("__init__.py", "__main__.py"):
            continue
        assert place(path) is not None, f"{path} is in no row of CONTRIBUTING's table"
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("depthmix."):
                parts = node.module.split(".")[1:]
                file = package.joinpath(*parts).with_suffix(".py")
                target = file if file.is_file() else package.joinpath(*parts, "__init__.py")
                assert place(target) <= place(path), f"{path} imports from {target}"
