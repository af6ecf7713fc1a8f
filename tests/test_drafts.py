"""Files are whole or not there, and a full disk is said in a sentence."""

from __future__ import annotations

import errno
import os
import sqlite3

import pytest
from safetensors import SafetensorError

from depthmix.files.drafts import (
    drafting,
    drafting_folder,
    is_draft,
    move_into,
    remove_whole,
    sweep,
    taking_room,
    write_whole,
)


def test_a_file_is_replaced_at_once(tmp_path):
    path = write_whole(tmp_path / "a.json", "old")
    assert write_whole(path, "né".encode()).read_text("utf-8") == "né"
    assert path.stat().st_mode & 0o444 == (0o666 & ~_umask()) & 0o444
    with pytest.raises(ValueError, match="in the middle"):
        _fail_in_the_middle(path)
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text("utf-8") == "né"


def _fail_in_the_middle(path):
    with drafting(path) as draft:
        draft.write_text("ha")
        assert is_draft(draft)
        raise ValueError("in the middle")


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr("depthmix.files.drafts.os.fsync", lambda _: done.append("sync"))
    monkeypatch.setattr(
        "depthmix.files.drafts.Path.replace", lambda self, path: done.append("replace") or path
    )
    write_whole(tmp_path / "a", "")
    assert done == ["sync", "replace", "sync"]


def test_a_folder_is_moved_file_by_file_and_what_stands_for_it_last(tmp_path, monkeypatch):
    source, target = tmp_path / ".new.tmp", tmp_path / "run"
    for name in ("weights", "settings", "z", "inner/a"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("new")
    target.mkdir()
    (target / "weights").write_text("old")
    (target / "other").write_text("old")
    moved = []
    replace = os.replace
    monkeypatch.setattr(
        "depthmix.files.drafts.Path.replace",
        lambda self, place: moved.append(self.name) or replace(self, place),
    )
    move_into(source, target, last=("weights", "settings"))
    assert moved == ["a", "z", "weights", "settings"]
    assert not source.exists()
    assert (target / "weights").read_text() == (target / "inner" / "a").read_text() == "new"
    assert (target / "other").read_text() == "old"


def test_a_folder_is_gone_at_once(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint-2"

    def fill():
        folder.mkdir()
        (folder / "a").write_text("")

    fill()
    remove_whole(folder)
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:  # interrupted
        patch.setattr("depthmix.files.drafts.shutil.rmtree", lambda _: None)
        fill()
        remove_whole(folder)
    assert [path.name for path in tmp_path.iterdir()] == [".checkpoint-2.tmp"]
    fill()
    remove_whole(folder)
    assert not list(tmp_path.iterdir())


def test_what_interruptions_leave_is_swept(tmp_path):
    for name in (".hidden", "a.tmp", "results.json"):
        (tmp_path / name).write_text("")
    (tmp_path / ".a.7.json.tmp").write_text("")
    (tmp_path / ".checkpoint-2.tmp").mkdir()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "a.tmp", "results.json"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EFBIG, "File too large", "{inside}"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0\nmore"),
        RuntimeError("basic_ios::clear: iostream error"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
        sqlite3.OperationalError("database or disk is full"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_disk_is_said_in_a_sentence(error, tmp_path):
    if isinstance(error, OSError) and error.filename:
        error.filename = str(tmp_path / "run" / "a")
    message = r"`output` must be a place with room, and .*run cannot be written \(.+\); make room"
    with (
        pytest.raises(OSError, match=message) as caught,
        taking_room(tmp_path / "run", "output", then="go on"),
    ):
        raise error
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/elsewhere/cache"),
        OSError(errno.ENOENT, "No such file or directory", "records.jsonl"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        FileNotFoundError("there is no file"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_stay_as_they_are(error, tmp_path):
    with pytest.raises(type(error)) as caught, taking_room(tmp_path, "output", then="go on"):
        raise error
    assert caught.value is error


def test_a_folder_is_whole_or_not_there(tmp_path):
    folder = tmp_path / "deep" / "out"
    with drafting_folder(folder) as draft:
        (draft / "a").write_text("a")
        assert is_draft(draft)
        assert not folder.exists()
    assert (folder / "a").read_text() == "a"

    def fail():
        with drafting_folder(folder, overwrite=True) as draft:
            (draft / "b").write_text("b")
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        fail()
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    assert (folder / "a").read_text() == "a"
    with drafting_folder(folder, overwrite=True) as draft:
        (draft / "b").write_text("b")
    assert [path.name for path in folder.iterdir()] == ["b"]
    (tmp_path / "empty").mkdir()
    with drafting_folder(tmp_path / "empty") as draft:
        (draft / "a").write_text("a")
    assert (tmp_path / "empty" / "a").is_file()
    for taken in (folder, folder / "b"):
        with pytest.raises(FileExistsError, match="`output` must be a folder that is not there"):
            drafting_folder(taken).__enter__()
