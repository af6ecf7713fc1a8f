"""A model by its name, made ready to generate fast: with its exits and their plan."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from depthmix.adapters.exit_files import (
    EXITS_NAME,
    PLAN_NAME,
    SETTINGS_NAME,
    UNVERIFIED_PLAN_NAME,
    load_exits,
    read_exit_settings,
)
from depthmix.adapters.exit_files import find_exits as find_saved_exits
from depthmix.decoding.draft_plan import DraftPlan
from depthmix.decoding.fast_generation import FastGeneration
from depthmix.files.json import read_object
from depthmix.method.exits import Exits
from depthmix.method.found_exits import find_exits
from depthmix.models.sources import resolve_model
from depthmix.models.spec import ModelSpec


def prepare_fast(
    model: nn.Module,
    spec: ModelSpec,
    *,
    exits: str | Path | None = None,
    verify: bool = True,
) -> FastGeneration:
    """Let a loaded model generate fast, with the exits that lie beside it.

    Args:
        model: The model, from `load_model`.
        spec: By what it was loaded.
        exits: Folder of the exits; by default `exits/` beside the adapter or the model.
        verify: Whether the top verifies what exits draft.

    Returns:
        What generates, by the plan beside the exits; without one all exits draft from 0.8 on.

    Raises:
        FileNotFoundError: If there are no exits.
        ValueError: If a file is damaged, or they were made for another model.
    """
    own, folder = find_own_exits(model, spec, exits)
    return FastGeneration(model, own, read_plan(folder, verify=verify), verify=verify)


def find_own_exits(
    model: nn.Module, spec: ModelSpec, exits: str | Path | None = None
) -> tuple[Exits, Path]:
    """Find the exits of a loaded model: those put on it, or those that it was trained with.

    Args:
        model: The model, from `load_model`.
        spec: By what it was loaded.
        exits: Their folder; by default `exits/` beside the adapter or the model.

    Returns:
        The exits, and the folder in which their plan lies or is to lie.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If a file is damaged, or they were made for another model.
    """
    folder = find_exit_folder(spec, exits)
    if folder is not None:
        return load_exits(folder, model), folder
    trained = find_exits(model) if exits is None else None
    place = Path(exits or spec.adapter or resolve_model(spec.name).directory_or_id).expanduser()
    if trained is None or not place.is_dir():
        name = "model" if exits is None else "exits"
        raise FileNotFoundError(
            f"`{name}` must have exits to draft with, and there are none in {place}; put some on "
            "by `depthmix add-exits`, and if they lie elsewhere, name their folder as `exits`."
        )
    return trained, place / EXITS_NAME


def find_exit_folder(spec: ModelSpec, exits: str | Path | None = None) -> Path | None:
    """Find the folder of exits that were put on a model.

    Args:
        spec: The model, by the place of its base and its adapter (`find_base`).
        exits: Where they are, if not beside the adapter or the model.

    Returns:
        The folder that holds `exits.json`; `None` where there are none.
    """
    if exits is not None:
        places = [Path(exits)]
    else:
        places = [spec.adapter, resolve_model(spec.name).directory_or_id]
    found = (find_saved_exits(place) for place in places if place is not None)
    return next((folder for folder in found if folder is not None), None)


def read_plan(folder: Path | str, *, verify: bool = True) -> DraftPlan | None:
    """Read the plan that `depthmix calibrate` has left beside exits.

    Args:
        folder: Of the exits.
        verify: Whether drafts are verified; there is a plan of its own for those that are not.

    Returns:
        The plan; `None` where there is none.

    Raises:
        ValueError: If the file is damaged, or was made for other exits than those beside it.
    """
    path = Path(folder) / (PLAN_NAME if verify else UNVERIFIED_PLAN_NAME)
    if not path.is_file():
        return None
    again = "calibrate again by `depthmix calibrate`"
    try:
        plan = DraftPlan.from_dict(read_object(path, way_out=again))
    except ValueError as error:
        why = str(error).rstrip(".")
        raise ValueError(f"{path} cannot be read ({why}); {again}.") from error
    if plan.exits_sha256 not in (None, hash_exits(folder)):
        raise ValueError(f"{path} was made for other exits than those that lie beside it; {again}.")
    return plan


def hash_exits(folder: Path | str) -> str | None:
    """Give the hash of the exits in a folder; `None` where the model was trained with its own."""
    is_there = (Path(folder) / SETTINGS_NAME).is_file()
    return read_exit_settings(folder)["sha256"] if is_there else None
