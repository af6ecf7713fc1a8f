"""What users see: public names, the README, committed configurations."""

from __future__ import annotations

import re
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
