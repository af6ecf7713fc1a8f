"""Published files: where they lie, how they are fetched, and whether they are the right ones."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from depthmix.libraries.extras import require

DATA_VARIABLE = "DEPTHMIX_DATA"
"""Environment variable that names the local folder of data sets."""

CACHE_VARIABLE = "DEPTHMIX_CACHE"
"""Environment variable that names the folder of downloaded files."""


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One published file."""

    path: str
    """Place of the file below a local folder."""

    records: int
    """Number of records in the file."""

    sha256: str
    """Checksum of its content."""

    url: str | None = None
    """Where it is published; `None` where it has no address of its own."""


def find_folders(data_dir: str | Path | None) -> list[Path]:
    """List the folders in which files may lie.

    Args:
        data_dir: Local folder; `None` takes the environment variable DEPTHMIX_DATA, if set.

    Returns:
        The local folder, if one is named, then that of downloaded files. Both have one layout.

    Raises:
        FileNotFoundError: If a local folder is named that does not exist.
    """
    given = data_dir or os.environ.get(DATA_VARIABLE)
    folders = [Path(given).expanduser()] if given else []
    if folders and not folders[0].is_dir():
        raise FileNotFoundError(
            f"`data_dir` (or the environment variable {DATA_VARIABLE}) must be an existing folder, "
            f"got {given}; leave it out to use public sources."
        )
    return [*folders, _find_cache()]


def locate(file: SourceFile, folders: Sequence[Path]) -> Path | None:
    """Find a file in the first folder that has it.

    Args:
        file: The file.
        folders: As `find_folders` lists them.

    Returns:
        Its path, or `None` if it is in none of them.
    """
    paths = (folder / file.path for folder in folders)
    return next((path for path in paths if path.is_file()), None)


def download(file: SourceFile) -> Path:
    """Fetch a file into the folder of downloaded files.

    Args:
        file: The file.

    Returns:
        Its path there.

    Raises:
        ValueError: If what came has another checksum; it is not kept.
        OSError: If the file has no address, or it cannot be reached.
    """
    way_out = (
        f"put it into a folder as {file.path}, and name the folder by `data_dir` or the "
        f"environment variable {DATA_VARIABLE}."
    )
    if file.url is None:
        raise FileNotFoundError(f"{file.path} is not at hand and has no address; {way_out}")
    target = _find_cache() / file.path
    require("lab", "A download", "pooch")
    import pooch

    try:
        path = pooch.retrieve(
            file.url, f"sha256:{file.sha256}", fname=target.name, path=target.parent
        )
    except ValueError as error:  # pooch's word for a wrong checksum
        raise ValueError(
            f"{file.url} must have the sha256 {file.sha256}, got other content; if you have the "
            f"original, {way_out}"
        ) from error
    except OSError as error:
        raise OSError(
            f"{file.path} is not at hand, and {file.url} could not be reached; {way_out}"
        ) from error
    return Path(path)


def check_content(file: SourceFile, path: Path) -> None:
    """Check a file's content against its checksum.

    Args:
        file: What it should be.
        path: Where it lies.

    Raises:
        ValueError: If it is another file.
    """
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != file.sha256:
        raise ValueError(
            f"{path} must have the sha256 {file.sha256}, got {digest}; put the original in its "
            "place, or remove it to use the public source."
        )


def _find_cache() -> Path:
    """Name the folder of downloaded files."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser()
    require("lab", "The folder of downloaded files", "pooch")
    import pooch

    return Path(pooch.os_cache("depthmix"))
