"""Files that are whole or not there: written as drafts, then put in their place."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DRAFT_SUFFIX = ".tmp"
"""Ending of what is not finished yet; its name begins with a dot. An interruption may leave one."""

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
"""Numbers of errors that say that a place cannot take a file."""

NO_ROOM_WORDS = ("no space left", "disk quota", "file too large", "file write failed")
NO_ROOM_WORDS += ("unexpected pos", "inline_container", "iostream error", "read-only file")
NO_ROOM_WORDS += ("database or disk is full", "disk i/o error")
"""How torch, safetensors and SQLite say so, whose errors have no number."""


@contextmanager
def drafting(path: Path) -> Iterator[Path]:
    """Put a file in its place when it is written, at once and for good.

    An interruption, a power failure or a full disk leaves the old file or the new one, or none
    where there was none; never a part.

    Args:
        path: The file; its folder must exist.

    Yields:
        A path in the same folder, where the block writes the content.

    Raises:
        OSError: If it cannot be written.
    """
    # In the same folder, since a file system cannot move at once between two; the process's own.
    draft = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}{DRAFT_SUFFIX}")
    try:
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException as error:
        with suppress(OSError):  # where a folder is a file, there is no draft either
            draft.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(draft):
            error.filename = str(path)  # the name that the caller knows
        raise
    _sync_folder(path.parent)


@contextmanager
def drafting_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Put a folder in its place when all of it is written.

    Args:
        folder: The folder; what it lies in is made if missing.
        overwrite: Replace one that is there already, which stays until then.

    Yields:
        An empty folder beside it, where the block writes the content.

    Raises:
        FileExistsError: If there is something of that name that may not be replaced.
        OSError: If it cannot be written.
    """
    there = folder.is_symlink() or folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    if there and not (overwrite and folder.is_dir()):
        way_out = "`overwrite=True` replaces it, or choose another folder"
        raise FileExistsError(
            f"`output` must be a folder that is not there yet, and {folder} is; "
            f"{way_out if folder.is_dir() else 'choose another name'}."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}{DRAFT_SUFFIX}")
    try:
        draft.mkdir()
        yield draft
        for path in draft.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        if there:
            remove_whole(folder)
        draft.replace(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    _sync_folder(folder.parent)


def write_whole(path: Path, content: str | bytes) -> Path:
    """Write a file by `drafting`.

    Args:
        path: The file; its folder must exist.
        content: Text, which becomes UTF-8, or bytes.

    Returns:
        The written file.

    Raises:
        OSError: If it cannot be written.
    """
    with drafting(path) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def move_into(source: Path, target: Path, *, last: tuple[str, ...] = ()) -> None:
    """Move the files of a folder into another one, each at once, and remove the folder.

    Args:
        source: The folder, in the same file system.
        target: Where they belong; what has the same name there is replaced.
        last: Names of files that stand for all the others, in the order in which they are moved.
    """
    paths = [path for path in source.rglob("*") if path.is_file()]
    order = {name: number for number, name in enumerate(last, start=1)}
    for path in sorted(paths, key=lambda one: (order.get(str(one.relative_to(source)), 0), one)):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)
    _sync_folder(target)
    shutil.rmtree(source)


def remove_whole(folder: Path) -> None:
    """Remove a folder so that an interruption leaves all of it, or nothing under its name."""
    removed = folder.with_name(f".{folder.name}{DRAFT_SUFFIX}")
    if removed.exists():
        shutil.rmtree(removed)
    shutil.rmtree(folder.replace(removed))


def is_draft(path: Path) -> bool:
    """Tell whether a file or folder is what an interruption may leave."""
    return path.name.startswith(".") and path.suffix == DRAFT_SUFFIX


def sweep(folder: Path) -> None:
    """Remove what interruptions have left in a folder that belongs to this process."""
    for path in filter(is_draft, list(folder.iterdir())):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def taking_room(place: Path, option: str, *, then: str) -> Iterator[None]:
    """Say in one sentence that a place cannot take what is written there.

    Args:
        place: Folder or file.
        option: Name of the option that says where it is.
        then: What to do when there is room.

    Raises:
        OSError: If the block fails because the disk is full or broken, or may not be written.
    """
    try:
        yield
    except Exception as error:
        reason = _find_reason(error, place)
        if reason is None:
            raise
        raise OSError(
            f"`{option}` must be a place with room, and {place} cannot be written ({reason}); make "
            f"room or choose another place, and then {then}."
        ) from error


def _find_reason(error: BaseException, place: Path) -> str | None:
    """Find words for a failure to write; None for any other one, and for another place."""
    if isinstance(error, OSError) and error.errno is not None:
        named = [name for name in (error.filename, error.filename2) if isinstance(name, str)]
        inside = [Path(name).resolve().is_relative_to(place.resolve()) for name in named]
        if error.errno in NO_ROOM and (not named or any(inside)):
            return os.strerror(error.errno)
        return None
    text = str(error)
    found = any(word in text.lower() for word in NO_ROOM_WORDS)
    return " ".join(text.splitlines()[0].split()) if found else None


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder outlast a power failure, where the system can say so."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems have no such thing
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
