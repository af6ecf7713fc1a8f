"""Adapters as they lie on disk: whether one is whole, and which files stand beside it."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from depthmix.files.json import parse
from depthmix.method.config import MixtureConfig
from depthmix.options.types import check_type, list_types

ANEW = "copy the adapter folder again, or train it anew"
"""What helps where an adapter's files are damaged."""


def check_adapter(directory: Path) -> dict[str, Any]:
    """Check that a saved adapter is complete, and of a kind that is loaded as what it is.

    Args:
        directory: Folder with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).

    Returns:
        The adapter's settings.

    Raises:
        ValueError: If a file is missing, cut off or damaged, or the two do not fit each other.
    """
    # What only names a model need not wait for PEFT.
    from peft import LoraConfig, PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from depthmix.adapters.weights import find_weights

    path = directory / "adapter_config.json"
    try:
        settings = parse(path.read_text("utf-8"))
        kind, _ = settings["peft_type"], settings["base_model_name_or_path"]
    except FileNotFoundError as error:
        raise ValueError(
            f"`model.adapter` must be the folder of a saved adapter, and {directory} has no "
            "adapter_config.json; pass the `output_dir` of a finished run."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"`model.adapter` is damaged: {path} is no adapter; {ANEW}.") from error
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(
            f"`peft_type` in {path} must be a method that PEFT knows, such as MODE_LORA, got "
            f"{kind!r}; update PEFT if it is a newer one's, or {ANEW}."
        )
    try:
        types = list_types(LoraConfig) if kind == "LORA" else {}
        for name in settings.keys() & types.keys():
            check_type(name, settings[name], types[name])
        config = PeftConfig.from_pretrained(str(directory))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"`model.adapter` is damaged: {path} cannot be read ({error}); {ANEW}."
        ) from error
    path, names = find_weights(directory), _list_weights(directory)
    if not names:
        raise ValueError(f"`model.adapter` is incomplete: {path} holds no weights; {ANEW}.")
    if not isinstance(config, MixtureConfig) and any(".lora_mode." in name for name in names):
        raise ValueError(
            f"`peft_type` must be MODE_LORA in the adapter_config.json of a mixture, and {path} "
            f"holds one under {kind}, which would drop it; copy both files from where they were "
            "saved."
        )
    return settings


def find_run_file(folder: Path, name: str) -> Path | None:
    """Find a file of a run, given the run's folder or that of one of its checkpoints.

    Args:
        folder: Of an adapter.
        name: Of the file.

    Returns:
        The file, or `None` if there is none.
    """
    folders = [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]
    return next((path for one in folders if (path := one / name).is_file()), None)


def _list_weights(directory: Path) -> list[str]:
    """Name the tensors in an adapter's file, or say in one sentence why it cannot be read."""
    from safetensors import SafetensorError, safe_open

    from depthmix.adapters.weights import find_weights, read_weights

    path = find_weights(directory)
    try:
        if path.suffix == ".bin":
            return list(read_weights(path))
        with safe_open(path, framework="pt") as weights:
            return list(weights.keys())
    except (OSError, SafetensorError, UnpicklingError, EOFError, RuntimeError) as error:
        why = " ".join(str(error).split())
        state = f"is cut off or damaged ({why})" if path.is_file() else "is missing"
        raise ValueError(f"`model.adapter` is incomplete: {path} {state}; {ANEW}.") from error
