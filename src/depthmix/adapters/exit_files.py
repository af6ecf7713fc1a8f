"""Exits as they lie in a folder: whole or not there, and of this model or refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from depthmix.adapters.checkpoint import is_finite
from depthmix.files.drafts import write_whole
from depthmix.files.json import read_object
from depthmix.files.runs import CALIBRATION_NAME, EXITS_NAME
from depthmix.method.backbone import Backbone
from depthmix.method.exits import Exits
from depthmix.method.fingerprint import Fingerprint
from depthmix.method.parts import find_parts, new_exits

WEIGHTS_NAME = "exits.safetensors"
"""File of the exits' weights."""

SETTINGS_NAME = "exits.json"
"""File that says what the weights are; without it there are no exits."""

PLAN_NAME = "plan.json"
"""File beside them that says how they draft, if they were calibrated."""

UNVERIFIED_PLAN_NAME = "unverified_plan.json"
"""File beside them that says how they draft where nothing verifies what they do."""

CALIBRATION_NAMES = {
    PLAN_NAME: CALIBRATION_NAME,
    UNVERIFIED_PLAN_NAME: "unverified_calibration.json",
}
"""Files beside the plans that say how each was found."""

FORMAT_VERSION = 1
"""Version of the two files."""

NUMBERS = ("rank", "hidden_size", "num_hidden_layers")
"""Whole numbers in the settings."""

ANEW = "copy the folder again, or put the exits on anew by `depthmix add-exits`"
"""What helps where the files are damaged."""


def save_exits(exits: Exits, folder: Path | str, **about: Any) -> Path:
    """Save exits: `exits.safetensors`, and `exits.json`, which says what it holds.

    The settings come last and hold a hash of the weights, so that an interruption leaves exits that
    are whole, or none. Plans of other exits that lie there are removed.

    Args:
        exits: Trained exits.
        folder: Where they are to lie; made if missing. Beside an adapter or a model that is its
            subfolder `exits`.
        about: What else is to be known of them, in JSON's types, such as the model's name.

    Returns:
        The folder.

    Raises:
        ValueError: If the weights hold NaN or infinite values.
        OSError: If the files cannot be written.
    """
    folder, weights = Path(folder), exits.state_dict()
    wrong = [name for name, tensor in weights.items() if not is_finite(tensor)]
    if wrong:
        raise ValueError(
            f"`exits` must be finite, and {len(wrong)} of their tensors hold NaN or infinite "
            f"values (the first is {wrong[0]}); train them anew with a lower `learning_rate`."
        )
    content = save({name: tensor.cpu().contiguous() for name, tensor in weights.items()})
    settings = {
        "format_version": FORMAT_VERSION,
        "layers": list(exits.layers),
        "rank": exits.rank,
        "hidden_size": exits.hidden_size,
        "num_hidden_layers": exits.num_hidden_layers,
        "sha256": hashlib.sha256(content).hexdigest(),
        "about": about,
    }
    if exits.made_for is not None:
        settings["made_for"] = exits.made_for.to_dict()
    text = json.dumps(settings, indent=2) + "\n"  # before anything is removed
    folder.mkdir(parents=True, exist_ok=True)
    for name in (SETTINGS_NAME, *CALIBRATION_NAMES, *CALIBRATION_NAMES.values()):
        (folder / name).unlink(missing_ok=True)
    write_whole(folder / WEIGHTS_NAME, content)
    write_whole(folder / SETTINGS_NAME, text)
    return folder


def find_exits(folder: Path | str) -> Path | None:
    """Find the exits in a folder, or beside the adapter or the model in it.

    Args:
        folder: Of exits, of an adapter, of a run or of a model.

    Returns:
        The folder that holds `exits.json`; `None` where there are no exits.
    """
    folder = Path(folder).expanduser()
    places = (folder, folder / EXITS_NAME)
    return next((place for place in places if (place / SETTINGS_NAME).is_file()), None)


def read_exit_settings(folder: Path | str) -> dict[str, Any]:
    """Read what exits were saved with, without their weights.

    Args:
        folder: As for `find_exits`.

    Returns:
        The content of `exits.json`: `layers`, `rank`, `hidden_size`, `num_hidden_layers`,
        `sha256` of the weights, `about`, and where it is known `made_for`, by which the model is
        told from others (`Fingerprint`).

    Raises:
        FileNotFoundError: If there are no exits.
        ValueError: If the file is damaged, or a later version's.
    """
    found = find_exits(folder)
    if found is None:
        raise FileNotFoundError(
            f"`folder` must hold exits, and {folder} holds neither {SETTINGS_NAME} nor "
            f"{EXITS_NAME}/{SETTINGS_NAME}; put exits on the model by `depthmix add-exits`."
        )
    path = found / SETTINGS_NAME
    settings = read_object(path, way_out=ANEW)
    version = settings.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"`format_version` in {path} must be {FORMAT_VERSION}, got {version!r}; update "
            "depthmix if a later version wrote it, or put the exits on anew."
        )
    numbers = [settings.get(name) for name in NUMBERS]
    layers = settings.get("layers")
    whole = isinstance(layers, list) and all(type(one) is int for one in [*layers, *numbers])
    if not whole or not isinstance(settings.get("sha256"), str):
        raise ValueError(f"{path} does not say what the exits are; {ANEW}.")
    if not isinstance(settings.get("about"), dict):
        raise ValueError(f"{path} has no section `about`, but something else; {ANEW}.")
    return settings


def load_exits(
    folder: Path | str,
    model: nn.Module,
    *,
    final_norm: str | None = None,
    decoder_layers: str | None = None,
) -> Exits:
    """Load the exits of a model: `load_exits("runs/arc", model)`.

    Args:
        folder: The exits' own folder, or that of the adapter, the run or the model in which they
            lie as `exits/`.
        model: The model that they were made for, with its adapter and its mixture.
        final_norm: Full name of the final norm of a model without a mixture, where it cannot be
            found by itself.
        decoder_layers: Full name of its `ModuleList` of layers, likewise.

    Returns:
        The exits, frozen, in float32, on the device of the model's final norm. What drafts with
        them sees whether they were made for the model that it drafts for.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If a file is damaged, or they were made for a model of another shape.
        TypeError: If it is no decoder-only language model.
    """
    settings = read_exit_settings(folder)
    found = find_exits(folder)
    assert found is not None  # or there were no settings
    backbone, norm = find_parts(model, final_norm=final_norm, decoder_layers=decoder_layers)
    _check_model(settings, backbone, found)
    try:
        exits = new_exits(backbone, norm, tuple(settings["layers"]), rank=settings["rank"])
    except ValueError as error:
        why = str(error).rstrip(".")
        raise ValueError(f"{found / SETTINGS_NAME} is damaged ({why}); {ANEW}.") from error
    weights = _read_weights(found / WEIGHTS_NAME, settings["sha256"])
    _check_weights(exits, weights, found / WEIGHTS_NAME)
    exits.load_state_dict(weights)
    exits.sha256 = settings["sha256"]
    exits.made_for = _read_made_for(settings, found)
    return exits.eval().requires_grad_(False)


def _check_model(settings: Mapping[str, Any], backbone: Backbone, folder: Path) -> None:
    """Refuse exits that were made for a model of another shape."""
    for name in ("num_hidden_layers", "hidden_size"):
        own = getattr(backbone, name)
        if settings[name] != own:
            made_for = settings["about"].get("model")
            of = f" (of {made_for})" if made_for else ""
            raise ValueError(
                f"`model` must be the one that the exits in {folder} were made for{of}, with "
                f"`{name}` {settings[name]}, and it has {own}; load that model, or put exits on "
                "this one by `depthmix add-exits`."
            )


def _read_made_for(settings: Mapping[str, Any], folder: Path) -> Fingerprint | None:
    """Read by what the exits' model is known; earlier versions did not say."""
    try:
        kept = settings.get("made_for")
        return None if kept is None else Fingerprint.from_dict(kept)
    except ValueError as error:
        raise ValueError(f"{folder / SETTINGS_NAME} is damaged ({error}); {ANEW}.") from error


def _read_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    """Read the weights, and see that they are those that were saved with the settings."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; {ANEW}.") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(
            f"{path} is not the file that {SETTINGS_NAME} was saved with: it is cut off, damaged "
            f"or of other exits; {ANEW}."
        )
    try:
        return load(content)
    except SafetensorError as error:
        raise ValueError(f"{path} holds no weights ({error}); {ANEW}.") from error


def _check_weights(exits: Exits, weights: Mapping[str, Tensor], path: Path) -> None:
    """Refuse weights that are not exactly the exits'."""
    own = exits.state_dict()
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in own.items()}
    given = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()}
    for fault, names in (
        ("lacks {}", shapes.keys() - given.keys()),
        ("holds {}, which the exits on this model do not have", given.keys() - shapes.keys()),
        (
            "has {} in another shape or type than the exits on this model",
            {name for name in shapes.keys() & given.keys() if shapes[name] != given[name]},
        ),
        (
            "holds NaN or infinite values in {}",
            {name for name, tensor in weights.items() if not is_finite(tensor)},
        ),
    ):
        if names:
            raise ValueError(f"{path} {fault.format(', '.join(sorted(names)))}; {ANEW}.")
