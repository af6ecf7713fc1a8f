"""The files by which the folder of a run is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from depthmix.files.json import read_object

RUN_CONFIG_NAME = "run_config.json"
"""File beside every result that says how it was made."""

RESULTS_NAME = "results.json"
"""File of a finished run's measurements, beside its adapter."""

HELD_OUT_NAME = "held-out.jsonl"
"""File in a run's folder of the records that its drafts are calibrated on."""

EXITS_NAME = "exits"
"""Folder of a model's exits, in its own."""

CALIBRATION_NAME = "calibration.json"
"""File beside exits that says how their plan was found, and what was measured."""


def read_run_settings(path: Path) -> dict[str, Any]:
    """Read the settings that a run left in its folder, whatever code wrote them.

    Args:
        path: Its `run_config.json`.

    Returns:
        The sections by name.

    Raises:
        ValueError: If the file is damaged, or tells of no run.
    """
    way_out = "copy the run again, or start it again with `overwrite=True`"
    settings = read_object(path, way_out=way_out)
    for name in ("model", "data", "mode", "training"):
        if not isinstance(settings.get(name, {}), dict):
            raise ValueError(f"{path} has no section `{name}`, but something else; {way_out}.")
    if not isinstance(settings.get("model", {}).get("name"), str):
        raise ValueError(f"{path} names no model; {way_out}.")
    return settings
