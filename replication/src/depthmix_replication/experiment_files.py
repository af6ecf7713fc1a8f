"""Experiments, scales and subjects as they lie in files."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, get_args

from depthmix.files.settings import build_section
from depthmix.options.types import suggest
from depthmix_replication.experiment import (
    Axis,
    Experiment,
    Method,
    Scale,
    ScaleSettings,
    Subject,
)

SHARED = ("scales", "subjects")
"""Files beside the experiments that all of them share."""


def list_experiments() -> list[str]:
    """Name the experiments that the package holds, those of the paper first."""
    folder = package_files("depthmix_replication") / "experiments"
    names = [path.name.removesuffix(".toml") for path in folder.iterdir()]
    kinds = ("table", "fig")
    return sorted(
        (name for name in names if name not in SHARED),
        key=lambda name: (
            next((number for number, kind in enumerate(kinds) if name.startswith(kind)), 2),
            name,
        ),
    )


def load_experiment(source: str, scale: Scale) -> Experiment:
    """Read an experiment as it is at one scale.

    Args:
        source: Name of one of the package's, or path of a TOML file in the same form, whose name
            is none of theirs.
        scale: What the file says under `scales` for it replaces what it says elsewhere.

    Returns:
        The experiment.

    Raises:
        ValueError: If there is no such experiment, the file is damaged, or its name is taken.
    """
    path, names = Path(source).expanduser(), list_experiments()
    if source in names:
        content = _read_own(source)
    elif not path.is_file():
        raise ValueError(
            f"`experiments` must name experiments of the package or TOML files, and {source} is "
            f"neither{suggest(source, names)}"
        )
    elif path.stem in names:
        raise ValueError(
            "`experiments` must not name a file like an experiment of the package, which has the "
            f"same folder of results, got {source}; rename the file, or ask for `{path.stem}`."
        )
    else:
        content = _parse(source, path.read_text("utf-8"))
    scales = content.pop("scales", {})
    if unknown := [name for name in scales if name not in get_args(Scale)]:
        raise ValueError(
            f"`scales.{unknown[0]}` of {source} is no scale{suggest(unknown[0], get_args(Scale))}"
        )
    content = merge(content, scales.get(scale, {})) | {"name": path.stem, "source": source}
    lists: dict[str, type] = {"methods": Method, "axes": Axis}
    for key, owner in lists.items():
        content[key] = tuple(build_section(key, part, owner) for part in content.get(key, ()))
    experiment: Experiment = build_section(path.stem, content, Experiment)
    if unknown := [name for name in experiment.subjects if name not in load_subjects()]:
        raise ValueError(
            f"`subjects` of {source} must be known ones, and {unknown[0]} is none"
            f"{suggest(unknown[0], load_subjects())}"
        )
    return experiment


def load_subjects() -> dict[str, Subject]:
    """Read all subjects by name."""
    return {
        name: build_section(name, content, Subject)
        for name, content in _read_own("subjects").items()
    }


def load_scale(scale: Scale) -> ScaleSettings:
    """Read what the experiments of one scale have in common."""
    return build_section(scale, _read_own("scales")[scale], ScaleSettings)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Join nested settings; where both have a value, `above` wins.

    Args:
        below: Sections and options.
        above: The same.

    Returns:
        New nested dictionaries.
    """
    merged = {**below}
    for name, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = merge(merged[name], value) if both else value
    return merged


def _read_own(name: str) -> dict[str, Any]:
    """Read one of the package's files."""
    folder = package_files("depthmix_replication") / "experiments"
    return _parse(name, (folder / f"{name}.toml").read_text("utf-8"))


def _parse(source: str, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"`experiments` cannot be read: {source} is damaged ({error}).") from error
