"""Data sets by name: from a local folder or their public source, checked against the catalogue."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from depthmix.data.instructions import INSTRUCTIONS, mix_math7k
from depthmix.data.schemas import FORMS, Records, read_rows
from depthmix.data.source_files import (
    DATA_VARIABLE,
    SourceFile,
    check_content,
    download,
    find_folders,
    locate,
)
from depthmix.libraries.extras import require
from depthmix.options.types import suggest

GITHUB = "https://raw.githubusercontent.com/"
"""Where the published files of a GitHub repository are."""

PARSERS = {**FORMS, "math7k": mix_math7k}
"""Parser of each form, mixtures among them."""


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """A data set on the Hugging Face hub."""

    id: str
    """Owner and name."""

    revision: str
    """Commit."""

    configs: tuple[str | None, ...] = (None,)
    """Configurations that are joined, in this order."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """A part of a data set."""

    records: int
    """Number of records that its files give."""

    files: tuple[SourceFile, ...]
    """The files that it is made from."""

    hub_records: int | None = None
    """Number of records on the hub; `None` where the hub is not its source."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """What the catalogue knows of a data set."""

    name: str
    """Name by which it is asked for."""

    title: str
    """Name for readers."""

    licence: str
    """Licence that its source states."""

    form: str
    """Parser of the data set's files."""

    splits: Mapping[str, Split]
    """Splits of the data set by name."""

    aliases: Mapping[str, str] = field(default_factory=dict)
    """Further names of splits."""

    hub: HubSource | None = None
    """Public source of the data set, where that is the hub."""

    @property
    def trainable(self) -> bool:
        """Whether its records can become instructions to train on."""
        return self.form in INSTRUCTIONS


def describe(name: str) -> DataSet:
    """Tell what the catalogue knows of a data set.

    Args:
        name: Its name.

    Returns:
        Title, licence, splits with their counts, and sources.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in CATALOG:
        raise ValueError(f"`{name}` is not a data set of the catalogue{suggest(name, CATALOG)}")
    return CATALOG[name]


def load_split(
    name: str, split: str = "test", *, data_dir: str | Path | None = None
) -> list[dict[str, Any]]:
    """Read a split of a named data set.

    It comes from the local folder where that has the files, else from the files downloaded earlier,
    else from its public source.

    Args:
        name: Name of the data set.
        split: Name of the split.
        data_dir: Local folder; `None` takes the environment variable DEPTHMIX_DATA, if set.

    Returns:
        Records in the data set's schema; new ones at each call.

    Raises:
        ValueError: If there is no such data set or split, or a checksum or a count is wrong.
        OSError: If the data are neither at hand nor to be had.
    """
    data_set = describe(name)
    part = _find_split(data_set, split)
    folders = find_folders(data_dir)
    paths = [locate(file, folders) for file in part.files]
    if data_set.hub is not None and part.hub_records is not None and None in paths:
        return _load_hub(data_set, split, part)
    rows = {}
    for file, path in zip(part.files, paths, strict=True):
        path = path or download(file)
        check_content(file, path)
        rows[file.path] = read_rows(path)
        _check_count(str(path), file.records, len(rows[file.path]))
    records = PARSERS[data_set.form](rows)
    _check_count(f"`{name}` ({split})", part.records, len(records))
    return records


def catalog_table() -> str:
    """Lay the catalogue out as a table for readers, in Markdown.

    Returns:
        One row per split: name, records, licence of the data set, and source.
    """
    lines = ["| name | split | records | source | licence |", "|---|---|---|---|---|"]
    for data_set in CATALOG.values():
        names = {split: [split] for split in data_set.splits}
        for alias, split in data_set.aliases.items():
            names[split].append(alias)
        for split, part in data_set.splits.items():
            records, source = f"{part.records:,}", ""
            urls = [_link(file.url) for file in part.files if file.url is not None]
            if data_set.hub is not None and part.hub_records is not None:
                source = f"hub: `{data_set.hub.id}` at `{data_set.hub.revision[:12]}`"
                if part.hub_records != part.records:
                    records = f"{part.records:,} of {part.hub_records:,}"
            elif urls:
                source = ", ".join(urls)
            else:
                source = "local folder only"
            label = ", ".join(f"`{spelling}`" for spelling in names[split])
            name = f"`{data_set.name}`: {data_set.title}"
            lines.append(f"| {name} | {label} | {records} | {source} | {data_set.licence} |")
    return "\n".join(lines)


def _link(url: str) -> str:
    """Write a file's address as a link by the name of its repository."""
    owner, repository, *_ = url.removeprefix(GITHUB).split("/")
    return f"[{owner}/{repository}]({url})"


def is_at_hand(name: str, split: str = "test", *, data_dir: str | Path | None = None) -> bool:
    """Tell whether a split can be read from files of this machine, without a download.

    Args:
        name: Name of the data set.
        split: Name of the split.
        data_dir: As for `load_split`.

    Returns:
        Whether all of its files are in the local folder or among those downloaded earlier.
    """
    folders = find_folders(data_dir)
    return all(locate(file, folders) for file in _find_split(describe(name), split).files)


def name_source(name: str, split: str = "test", *, data_dir: str | Path | None = None) -> str:
    """Say where a split comes from, for the record of a result.

    Args:
        name: Name of the data set.
        split: Name of the split.
        data_dir: As for `load_split`.

    Returns:
        Its first file with the start of its checksum, or the data set on the hub with its commit;
        no path of this machine.
    """
    data_set = describe(name)
    part = _find_split(data_set, split)
    if data_set.hub and part.hub_records and not is_at_hand(name, split, data_dir=data_dir):
        return f"{data_set.hub.id}@{data_set.hub.revision[:12]}"
    first, *others = part.files
    more = f" and {len(others)} more" if others else ""
    return f"{first.path} (sha256 {first.sha256[:12]}){more}"


def name_whole(name: str, split: str = "test", *, data_dir: str | Path | None = None) -> str | None:
    """Name what a split is read from where its files would hold a sample only.

    Args:
        name: Name of the data set.
        split: Name of the split.
        data_dir: As for `load_split`.

    Returns:
        The data set on the hub with its commit; `None` where the files are at hand, or hold as
        much.
    """
    part = _find_split(describe(name), split)
    if part.hub_records in (None, part.records) or is_at_hand(name, split, data_dir=data_dir):
        return None
    return name_source(name, split, data_dir=data_dir)


def _find_split(data_set: DataSet, split: str) -> Split:
    split = data_set.aliases.get(split, split)
    if split not in data_set.splits:
        names = [*data_set.splits, *data_set.aliases]
        raise ValueError(f"`{split}` is not a split of {data_set.name}{suggest(split, names)}")
    return data_set.splits[split]


def _load_hub(data_set: DataSet, split: str, part: Split) -> Records:
    """Read a split from the hub, or from its cache."""
    require("lab", "Data from the hub", "datasets")
    import datasets

    hub = data_set.hub
    assert hub is not None
    hub_split = data_set.aliases.get(split, split)
    rows = {}
    for config in hub.configs:
        try:
            loaded = datasets.load_dataset(hub.id, config, split=hub_split, revision=hub.revision)
        except (OSError, datasets.exceptions.DatasetsError) as error:
            raise OSError(
                f"Cannot get data set `{data_set.name}`: it is not at hand, and {hub.id} could not "
                f"be had from the hub; put {part.files[0].path} and the like into a folder, and "
                f"name that by `data_dir` or the environment variable {DATA_VARIABLE}."
            ) from error
        rows[f"{config}_{hub_split}"] = [dict(row) for row in loaded]
    records = PARSERS[data_set.form](rows)
    _check_count(f"{hub.id} ({split})", part.hub_records, len(records))
    return records


def _check_count(source: str, expected: int | None, count: int) -> None:
    if count != expected:
        raise ValueError(
            f"{source} must have {expected:,} records, got {count:,}; if you have the original, "
            f"name its folder by `data_dir` or the environment variable {DATA_VARIABLE}."
        )


def _read_catalog() -> Iterator[DataSet]:
    """Read the catalogue's file."""
    text = package_files("depthmix.data").joinpath("catalog.toml").read_text("utf-8")
    for name, table in tomllib.loads(text).items():
        splits = {}
        for split, options in table.pop("splits").items():
            files = tuple(SourceFile(**file) for file in options.pop("files"))
            total = sum(file.records for file in files)
            splits[split] = Split(**{"records": total} | options, files=files)
        hub = table.pop("hub", None)
        if hub is not None:
            hub = HubSource(**hub | {"configs": tuple(hub.get("configs", (None,)))})
        yield DataSet(name=name, **table, splits=splits, hub=hub)


CATALOG: dict[str, DataSet] = {data_set.name: data_set for data_set in _read_catalog()}
"""All data sets by name."""
