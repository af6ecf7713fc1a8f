"""What code a result says that it was made with."""

import subprocess
from importlib.metadata import version

from packaging.version import Version

from depthmix.files import versions
from depthmix.files.versions import find_commit, list_versions
from oldest import ROOT, find_lower_bounds


def git(folder, *arguments):
    names = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    command = ["git", "-C", str(folder), *names, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_that_of_the_file_with_a_mark_for_changes(tmp_path):
    git(tmp_path, "init")
    tracked, other = tmp_path / "a.py", tmp_path / "b.py"
    for file in (tracked, other):
        file.write_text("1")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-m", "first")
    commit = git(tmp_path, "rev-parse", "--short=9", "HEAD")
    find_commit.cache_clear()
    assert find_commit(tracked) == commit  # what is not tracked is no change
    assert find_commit(other) is None
    tracked.write_text("2")
    assert find_commit(tracked) == commit  # asked once
    find_commit.cache_clear()
    assert find_commit(tracked) == f"{commit}+"


def test_outside_of_a_repository_and_without_git_there_is_no_commit(tmp_path, monkeypatch):
    file = tmp_path / "a.py"
    file.write_text("1")
    assert find_commit(file) is None
    find_commit.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_commit(file) is None


def test_versions_are_those_of_the_packages(monkeypatch):
    for commit in (None, "0123abcde+"):
        monkeypatch.setattr(versions, "find_commit", lambda _, commit=commit: commit)
        expected = {"depthmix": version("depthmix"), "torch": version("torch")}
        expected |= {"commit": commit} if commit else {}
        assert list_versions(["depthmix", "torch"]) == expected


def test_the_oldest_versions_are_the_lower_bounds(tmp_path):
    project = tmp_path / "pyproject.toml"
    project.write_text(
        '[project]\ndependencies = ["torch>=2.6", "peft>=0.21.0,<0.22", "itself[lab]"]\n'
        '[project.optional-dependencies]\neval = ["lm-eval[hf]>=0.4.13"]\n'
    )
    assert find_lower_bounds(project) == {"torch": "2.6", "peft": "0.21.0", "lm-eval": "0.4.13"}


def test_no_lower_bound_is_above_what_we_develop_with():
    pins = dict(
        line.replace("_", "-").lower().split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    bounds = find_lower_bounds(ROOT / "pyproject.toml", ROOT / "replication" / "pyproject.toml")
    bounds = {name.replace("_", "-").lower(): version for name, version in bounds.items()}
    assert {"torch", "transformers", "peft", "trl"} <= bounds.keys() & pins.keys()
    assert all(Version(bounds[name]) <= Version(pins[name]) for name in bounds.keys() & pins.keys())
