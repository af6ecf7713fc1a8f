"""A model by its name, made ready to generate fast: with its exits and their plan."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from depthmix.adapters.exit_files import (
    PLAN_NAME,
    UNVERIFIED_PLAN_NAME,
    find_exits,
    load_exits,
    read_exit_settings,
)
from depthmix.decoding.draft_plan import DraftPlan
from depthmix.decoding.fast_generation import FastGeneration
from depthmix.files.json import read_object
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
    folder = find_exit_folder(spec, exits)
    own = load_exits(folder, model)
    return FastGeneration(model, own, read_plan(folder, verify=verify), verify=verify)


def find_exit_folder(spec: ModelSpec, exits: str | Path | None = None) -> Path:
    """Find a model's exits.

    Args:
        spec: The model.
        exits: Where they are, if not beside the adapter or the model.

    Returns:
        The folder that holds `exits.json`.

    Raises:
        FileNotFoundError: If there are none.
    """
    places = [exits] if exits is not None else [spec.adapter, spec.name]
    for place in places:
        if place is not None and (found := find_exits(place)) is not None:
            return found
    if exits is not None:
        read_exit_settings(exits)  # says what is missing
    raise FileNotFoundError(
        f"`fast` needs exits, which draft, and {spec.adapter or spec.name} has none; put some on "
        "by `depthmix add-exits`, or name their folder by `exits`."
    )


def read_plan(folder: Path | str, *, verify: bool = True) -> DraftPlan | None:
    """Read the plan that `depthmix calibrate` has left beside exits.

    Args:
        folder: Of the exits.
        verify: Whether drafts are verified; there is a plan of its own for those that are not.

    Returns:
        The plan; `None` where there is none.

    Raises:
        ValueError: If the file is damaged.
    """
    path = Path(folder) / (PLAN_NAME if verify else UNVERIFIED_PLAN_NAME)
    if not path.is_file():
        return None
    again = "calibrate again by `depthmix calibrate`"
    try:
        return DraftPlan.from_dict(read_object(path, way_out=again))
    except ValueError as error:
        why = str(error).rstrip(".")
        raise ValueError(f"{path} cannot be read ({why}); {again}.") from error
