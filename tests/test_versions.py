"""What code a result says that it was made with."""

import subprocess
from importlib.metadata import version

from depthmix.files import versions
from depthmix.files.versions import find_commit, list_versions


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
