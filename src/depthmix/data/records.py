"""Records from a file, from a named data set or from the hub."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TextIO

from depthmix.data.catalog import CATALOG, describe, load_split
from depthmix.data.instructions import INSTRUCTIONS
from depthmix.files.json import parse
from depthmix.libraries.extras import require


def load_records(
    source: str,
    *,
    split: str = "train",
    limit: int | None = None,
    data_dir: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Read records from a JSON, JSONL, CSV or Parquet file, a named data set, or the hub.

    Args:
        source: Path of a file, name of a data set of the catalogue, or id of one on the hub; the
            first that there is, in this order. Named data sets become instructions.
        split: Split of a data set; files have none.
        limit: Read this many from the start; `None` reads all.
        data_dir: Local folder of named data sets; `None` takes the environment variable
            DEPTHMIX_DATA, if set.

    Returns:
        The records, at least one.

    Raises:
        ValueError: If there is no record, the file cannot be parsed, or the named data set is not
            what the catalogue says, has no such split or cannot be trained on.
        OSError: If there is no such file or data set.
    """
    records = load_published(source, split=split, limit=limit, data_dir=data_dir)
    return to_instructions(records, source)


def to_instructions(records: Sequence[Mapping[str, Any]], source: str) -> list[dict[str, Any]]:
    """Write the records of a named data set as instructions.

    Args:
        records: From `load_published`.
        source: Where they come from.

    Returns:
        Instructions; records of a file or of the hub as they are.
    """
    write = INSTRUCTIONS[describe(source).form] if is_named(source) else dict
    return [write(record) for record in records]


def load_published(
    source: str,
    *,
    split: str = "train",
    limit: int | None = None,
    data_dir: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Read the same records as `load_records`, but those of a named data set in its schema.

    Args:
        source: As for `load_records`.
        split: As for `load_records`.
        limit: As for `load_records`.
        data_dir: As for `load_records`.

    Returns:
        The records, at least one.

    Raises:
        ValueError: As for `load_records`.
        OSError: As for `load_records`.
    """
    check_limit(limit)
    path = Path(source).expanduser()
    if path.is_file():
        try:
            records = _read_file(path, limit)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"`data` cannot be read from {path}: byte {error.start} is no text in UTF-8; save "
                "the file in that encoding."
            ) from error
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"`data` cannot be read from {path}: {reason}") from error
    elif is_named(source):
        if not describe(source).trainable:
            raise ValueError(
                f"`data` must be records that can be written as instructions, and {source} is a "
                "benchmark only; leave it to the evaluation."
            )
        records = load_split(source, split, data_dir=data_dir)[:limit]
    else:
        records = _read_hub(source, split, limit)
    if not records:
        raise ValueError(f"`data` must hold at least one record, and {source} is empty.")
    for number, record in enumerate(records, start=1):
        if not isinstance(record, Mapping):
            raise ValueError(
                f"`data` must be a list of objects with named fields, and record {number} of "
                f"{source} is {record!r:.80}."
            )
    return records


def is_named(source: str) -> bool:
    """Tell whether a source of records is a named data set.

    Args:
        source: As for `load_records`, where an existing file wins.

    Returns:
        Whether it is neither a file nor on the hub.
    """
    return source in CATALOG and not Path(source).expanduser().is_file()


def is_path(source: str) -> bool:
    """Tell whether a source of records is meant as a path, whether there is a file or not.

    Args:
        source: As for `load_records`.

    Returns:
        Whether it looks like one, or is a folder, and so is no name on the hub.
    """
    path = Path(source).expanduser()
    return (
        path.suffix in (".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".arrow")
        or source.startswith((".", "~", "/"))
        or source.count("/") > 1
        or (path.parent != Path() and path.parent.is_dir())
        or path.is_dir()
    )


def check_limit(limit: int | None) -> None:
    """Check the number of records to use at most.

    Args:
        limit: The number; `None` stands for all.

    Raises:
        ValueError: If it is not at least 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(
            f"`data.limit` must be at least 1, got {limit}; leave it out to use all records."
        )


def _read_file(path: Path, limit: int | None) -> list[Any]:
    """Read a file by its suffix."""
    if path.suffix == ".parquet":
        return _read_parquet(path, limit)
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".json":
            records = parse(file.read())
            if not isinstance(records, list):
                kind = type(records).__name__
                raise ValueError(f"a JSON file must be a list of records, not one {kind}.")
            return records[:limit]
        if path.suffix == ".csv":
            return list(islice(_read_csv(file), limit))
        if path.suffix == ".jsonl":
            return list(islice(_read_lines(file), limit))
    raise ValueError(f"its ending must be .json, .jsonl, .csv or .parquet, not {path.suffix!r}.")


def _read_lines(file: TextIO) -> Iterator[Any]:
    """Read JSON line by line; an error has the line's number in the file."""
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield parse(line.rstrip())
            except ValueError as error:
                reason = getattr(error, "msg", str(error))
                place = f", column {error.colno}" if isinstance(error, JSONDecodeError) else ""
                raise ValueError(
                    f"line {number} is no JSON ({reason}{place}); each line must be one record."
                ) from error


def _read_csv(file: TextIO) -> Iterator[dict[str, str]]:
    """Read a table whose first row names the columns; an error has the line's number."""
    reader = csv.reader(file, strict=True)
    try:
        rows = ((reader.line_num, row) for row in reader if row)
        _, names = next(rows, (0, []))
        _check_columns(names)
        for number, row in rows:
            if len(row) != len(names):
                raise ValueError(
                    f"line {number} has {len(row)} cells, and the first row names {len(names)} "
                    "columns; put texts with commas in quotes."
                )
            yield dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} is no CSV ({error}).") from error


def _read_parquet(path: Path, limit: int | None) -> list[Any]:
    """Read the first rows of a Parquet file."""
    require("lab", "A Parquet file", "pyarrow")
    from pyarrow import ArrowException, parquet

    try:
        _check_columns(parquet.read_schema(path).names)
        return parquet.read_table(path).slice(length=limit).to_pylist()
    except ArrowException as error:
        raise ValueError(str(error)) from error


def _check_columns(names: Sequence[str]) -> None:
    """Refuse two columns of one name, of which the last would win."""
    twice = next((name for name in names if list(names).count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"the column {twice!r} stands twice; rename or remove one.")


def _read_hub(source: str, split: str, limit: int | None) -> list[dict[str, Any]]:
    """Read a data set of the hub, or of its cache."""
    if is_path(source):
        what = "a folder" if Path(source).expanduser().is_dir() else "none"
        raise FileNotFoundError(
            f"`data` must be an existing file, and there is {what} at {source}."
        )
    require("lab", "Data from the hub", "datasets")
    import datasets

    try:
        dataset = datasets.load_dataset(source, split=split)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise OSError(
            f"Cannot find data `{source}`: it is no local file and no named data set, and the hub "
            "has none of that name or could not be reached; pass the path of a JSON, JSONL, CSV or "
            "Parquet file."
        ) from error
    return [dict(record) for record in islice(dataset, limit)]
